"""Experts that stay on disk: slots for a share of them, read where the router chooses others."""
