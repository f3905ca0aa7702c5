"""What each mlx-lm module expects, as data."""
