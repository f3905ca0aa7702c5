"""The loaded mlx-lm model and its layers."""
