"""The embedded MLX platform: vLLM's scheduler, sampler and server over mlx-lm models.

Four packages, each of which imports only those before it:

* ``pages``: storage of one layer between steps (KV pages, states) and attention over it;
* ``model``: loading a checkpoint, and describing the caches of its layers;
* ``step``: requests, forward passes and sampling of one engine step;
* ``vllm``: the platform, worker and runner that vLLM calls; the only one that imports vllm.
"""
