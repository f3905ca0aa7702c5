"""The command ``convert``: write a checkpoint in another layout.

``conversion`` drives the work. ``to_mlx`` and ``to_published`` produce the tensors,
``rewrite.shards`` writes them, and ``folder`` makes the target appear complete or not at all.
"""
