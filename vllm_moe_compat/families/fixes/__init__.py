"""Corrections of forward passes that compute something else than the config says.

A module of mlx-lm that ignores a setting gets it put in, on the instance that is loaded:
mlx-lm's classes are not changed. ``fix`` defines the interface, the other files hold one kind
of setting each, and a row lists what its module needs (``Row.fixes``).
"""
