"""Loading a model and describing the caches of its layers."""
