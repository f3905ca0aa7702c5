"""The results of probes, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

RIGHT, WRONG, REFUSED, FAILS = "right", "wrong", "refused", "fails"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of one load.

    Attributes:
        word: ``right``; ``wrong`` (it loads, and its logits differ); ``refused`` (the load
            raises); ``fails`` (it loads, and the forward pass raises).
        why: the error or the difference; empty where the result is right.
        distance: max|d| / max|expected| of the logits; None where there are none.
    """

    word: str
    why: str = ""
    distance: float | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """One form of a tiny checkpoint, loaded without the hooks and with them.

    Attributes:
        family: name of the recorded family.
        form: name of the form, a key of ``variants.FORMS``.
        oracle: source of the expected logits: ``transformers``, or ``mlx-lm`` itself.
        upstream: the result of mlx-lm without the hooks.
        patched: the result with the hooks; None where that was not tried.
    """

    family: str
    form: str
    oracle: str
    upstream: Verdict
    patched: Verdict | None = None
