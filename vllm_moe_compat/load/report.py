"""What one load did, for the log and for ``status()``: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was done to one checkpoint.

    Attributes:
        path: its folder, or None when ``sanitize`` was called with a bare dict.
        module: the mlx-lm module that was loaded.
        words: the layout that was found.
        experts: routed experts per layer, where they were stacked; else 0.
        layers: layers whose experts were stacked.
        dequantized: FP8 tensors that were dequantised.
        digested: FP8 tensors that upstream's ``sanitize`` dequantised.
        dtype: what the others became, on the way or in the end; None if there were none.
        seconds: how long it took.
        setting: to what weights were quantised; ``none``, ``8bit``, …
        quantized: modules that were quantised.
        odd: modules that were not, since their rows are no whole number of groups.
        spared: modules that were not, since the checkpoint lists them.
        read: bytes of the tensors that are loaded, as stored.
        held: format → bytes in memory, the largest first.
        saved: bytes that quantising saved over the dtype of the values.
        peak: the most that MLX held meanwhile, in bytes; 0 where nothing was done.
    """

    path: str | None
    module: str
    words: str
    experts: int
    layers: int
    dequantized: int
    dtype: str | None
    seconds: float
    setting: str = "none"
    quantized: int = 0
    odd: int = 0
    spared: int = 0
    read: int = 0
    held: Mapping[str, int] = field(default_factory=dict)
    saved: int = 0
    peak: int = 0
    digested: int = 0

    def __str__(self) -> str:
        done = []
        if self.layers:
            done.append(f"stacked {self.experts} experts x {self.layers} layers")
        if self.dequantized:
            becomes = f" to {self.dtype}" if self.setting == "none" else ""
            done.append(f"dequantised {self.dequantized:,} tensors{becomes}")
        if self.setting != "none":
            done.append(f"quantised {self.quantized:,} modules to {self.setting}{self._exceptions}")
        head = f"{self.path or 'weights without a path'} ({self.module}): {self.words}"
        if not done and self.digested:
            return f"{head}; left as it is, with {self.digested:,} FP8 tensors, to mlx-lm"
        if not done:
            return f"{head}; left as it is"
        holds = ", ".join(f"{size(count)} {form}" for form, count in self.held.items())
        return (
            f"{head}; read {size(self.read)}, {', '.join(done)} in {self.seconds:.1f} s, "
            f"peak {size(self.peak)}; holds {holds}"
            + (f", {size(self.saved)} less than in {self.dtype}" if self.saved else "")
        )

    @property
    def _exceptions(self) -> str:
        kept = []
        if self.odd:
            kept.append(f"{self.odd:,} stay, whose rows are no multiple of the group")
        if self.spared:
            kept.append(f"{self.spared:,} stay, which the checkpoint lists")
        return f" ({'; '.join(kept)})" if kept else ""


_last: LoadReport | None = None


def last_report() -> LoadReport | None:
    """Return the report of this process's last load, or None before the first."""
    return _last


def remember(report: LoadReport) -> None:
    """Keep the report for ``last_report``."""
    global _last
    _last = report


def size(count: int) -> str:
    """Write bytes for people."""
    for unit, width in (("GiB", 30), ("MiB", 20)):
        if count >= 2**width:
            return f"{count / 2**width:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"
