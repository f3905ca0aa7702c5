"""The two hooks inside mlx-lm, and what one load is."""
