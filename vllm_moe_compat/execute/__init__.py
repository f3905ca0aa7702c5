"""A plan carried out on MLX arrays."""
