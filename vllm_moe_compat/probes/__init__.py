"""Probes: load tiny checkpoints through mlx-lm, with the hooks and without."""
