"""Plan how a checkpoint's tensors become the tensors of an mlx-lm module, as data.

A plan lists every tensor to make, with its sources and operations. It is complete before a
tensor is read, so faulty checkpoints are refused before that.
"""
