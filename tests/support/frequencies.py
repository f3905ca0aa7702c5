"""Draws against the probabilities that they should have."""

from __future__ import annotations

from typing import Any

import numpy as np


def agrees(counts: Any, expected: Any) -> None:
    """Same support, and a chi-square within five standard deviations of its mean.

    ``counts [V]`` of draws, and their probabilities ``expected [V]``.
    """
    assert not counts[expected == 0].any(), "a token outside of the support"
    wanted = expected * counts.sum()
    assert counts[wanted > 15].all(), "a token of the support that is never drawn"
    rare = wanted < 10
    seen = np.append(counts[~rare], counts[rare].sum())
    want = np.append(wanted[~rare], wanted[rare].sum())
    seen, want = seen[want > 0], want[want > 0]
    freedom = len(want) - 1
    if freedom:
        chi_square = float(((seen - want) ** 2 / want).sum())
        assert chi_square < freedom + 5 * (2 * freedom) ** 0.5
