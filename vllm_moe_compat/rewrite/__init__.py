"""A checkpoint's tensors in another layout, by the inverses of a plan's operations."""
