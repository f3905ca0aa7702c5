"""The command ``inspect``: describe a checkpoint and its load from headers alone.

``collect`` makes an ``Inspection`` of a path; ``text``, ``as_json`` and ``markdown`` render
it. Nothing here imports MLX, mlx-lm, torch or transformers.
"""
