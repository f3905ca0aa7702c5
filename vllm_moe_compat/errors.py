"""The exceptions that this package raises.

All are ``ValueError``, the type that callers (mlx-lm, vLLM, scripts) expect for an invalid
checkpoint or setting. Every message is one sentence that names the file, the tensor or setting,
the finding, the expectation and the remedy.
"""

from __future__ import annotations


class CompatError(ValueError):
    """Base class of the package's exceptions."""


class SettingError(CompatError):
    """The value of an environment variable or argument is not valid."""


class CheckpointFileError(CompatError):
    """A file of the checkpoint is missing, truncated, corrupt or unreadable."""


class LayoutError(CompatError):
    """The checkpoint's tensors contradict each other or the config."""


class UnsupportedCheckpointError(CompatError):
    """The checkpoint is sound, but its weights cannot be loaded correctly here."""


class InsufficientMemoryError(CompatError):
    """The weights need more memory than the machine has."""


class UnsupportedServingError(CompatError):
    """The embedded backend cannot serve this model or setting."""


class RequestError(CompatError):
    """A request to the embedded backend cannot be computed; the server goes on."""
