"""The model and its parts; each file stands alone and imports only torch, `neucore.py` and the adapters excepted."""
