"""Many trainings as one table: methods x seeds, ablations, learning curves. Knows runs by their configs and files."""
