"""Where vLLM expects hardware that is not there, or differs between versions.

Each function says what vLLM does, why that is wrong here, and when it can go.
"""

from __future__ import annotations

import torch


def allow_shutdown_without_accelerator() -> None:
    """Let vLLM's shutdown finish on a host without a torch accelerator.

    ``cleanup_dist_env_and_memory`` empties the accelerator's cache on every
    platform but its own CPU one, and torch raises where there is none, so the
    engine process ended with a traceback. Remove when vLLM asks
    ``torch.accelerator.is_available()`` first.
    """
    if torch.accelerator.is_available():
        return

    def nothing_to_empty() -> None:
        """There is no accelerator, so there is no cache."""

    torch.accelerator.empty_cache = nothing_to_empty
    if hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache = nothing_to_empty
