"""Tensor parallelism: how a model is cut, and how a rank loads its share. No vLLM inside."""
