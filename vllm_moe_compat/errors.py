"""The exceptions that this package raises on purpose.

All of them are ``ValueError``: a checkpoint or a setting was wrong, and the
caller (mlx-lm, vLLM, a script) already expects that type for it. Every message
is one sentence that names the file, the tensor, what was found, what was
expected and what to do.
"""

from __future__ import annotations


class CompatError(ValueError):
    """Base of everything that vllm_moe_compat refuses."""


class SettingError(CompatError):
    """An environment variable or argument has a value that means nothing."""


class CheckpointFileError(CompatError):
    """A file of the checkpoint is missing, truncated, corrupt or unreadable."""


class LayoutError(CompatError):
    """The tensors of the checkpoint contradict each other or the config."""


class UnsupportedCheckpointError(CompatError):
    """The checkpoint is sound, but no right result can be had for it here."""


class InsufficientMemoryError(CompatError):
    """The machine does not have the memory that the weights would take."""


class UnsupportedServingError(CompatError):
    """The embedded backend cannot serve this model or setting."""
