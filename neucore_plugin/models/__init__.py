"""NEUCORE, the baselines and their parts; `base`, `neucore`, `baseline` and adapters in `backbones/` know the host."""
