"""Write a checkpoint in another layout, with the inverses of a plan's operations."""
