"""NEUCORE, the baselines and their parts; only `base`, `neucore`, `baseline` and adapters in `backbones/` know the host."""
