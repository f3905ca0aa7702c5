"""Loading a model, and finding out what its layers store."""
