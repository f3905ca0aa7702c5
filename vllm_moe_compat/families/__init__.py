"""The expectations of each mlx-lm module, as data."""
