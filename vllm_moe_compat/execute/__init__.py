"""Run plans on MLX arrays."""
