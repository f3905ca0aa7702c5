"""The command ``status``."""
