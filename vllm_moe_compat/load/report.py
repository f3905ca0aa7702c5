"""The report of a load, for the log and for ``status()``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_moe_compat.plan.expert_cache import CachePlan


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The report of one load.

    Attributes:
        path: the checkpoint's folder; None if ``sanitize`` was called without ``load_config``.
        module: import path of the mlx-lm module.
        words: the layout in a message.
        experts: routed experts per layer, if they were stacked; else 0.
        layers: number of layers whose experts were stacked.
        dequantized: number of weights that the plan dequantised.
        dtype: dtype of dequantised weights, before they were quantised; None for none.
        seconds: duration.
        setting: quantisation setting: ``none``, ``8bit``, …
        quantized: number of quantised modules.
        odd: number of modules left as floats because their rows are not whole groups.
        spared: number of modules left as floats because the checkpoint lists them.
        read: bytes of the loaded tensors as stored.
        held: format or dtype → bytes in memory, the largest first.
        saved: bytes saved by quantising, compared with the dtype of the values.
        peak: largest number of bytes that MLX held; 0 if the plan was empty.
        digested: number of weights that upstream dequantised or keeps.
        max_length: tokens up to which the module is right; None for any.
        max_length_reason: what it computes beyond that.
        held_packed: number of weights that stay packed as they are stored.
        packed_as: MLX's formats of these weights.
        lazy: whether the tensors were left unread, to be made when they are first used.
        expert_cache: the slots of each layer with experts; None if all experts were loaded.
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
    max_length: int | None = None
    max_length_reason: str = ""
    held_packed: int = 0
    packed_as: tuple[str, ...] = ()
    lazy: bool = False
    expert_cache: CachePlan | None = None

    def __str__(self) -> str:
        if (cache := self.expert_cache) is None or cache.all_resident:
            return self._made
        return f"{self._made}; {experts_held(cache)}"

    @property
    def _made(self) -> str:
        done = []
        if self.layers and (self.expert_cache is None or self.expert_cache.all_resident):
            done.append(f"stacked {self.experts} experts x {self.layers} layers")
        if self.held_packed:
            done.append(f"kept {self.held_packed:,} weights packed as {', '.join(self.packed_as)}")
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
        if self.lazy:
            return f"{head}; {', '.join(done)} when they are first used: the caller loads lazily"
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
            kept.append(f"{self.odd:,} not, since their rows are not whole groups")
        if self.spared:
            kept.append(f"{self.spared:,} not, since the checkpoint lists them")
        return f" ({'; '.join(kept)})" if kept else ""


_last: LoadReport | None = None


def last_report() -> LoadReport | None:
    """Return the report of the last load in this process, or None before the first."""
    return _last


def remember(report: LoadReport) -> None:
    """Store the report for ``last_report``."""
    global _last
    _last = report


def experts_held(cache: CachePlan) -> str:
    """Say which experts a cache holds: slots, experts, layers, share and bytes."""
    fewest, most = min(cache.slots), max(cache.slots)
    slots = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return (
        f"keeps {slots} of {max(layer.experts for layer in cache.layers)} experts in each of "
        f"{len(cache.layers)} layers in memory ({size(cache.nbytes)} of {size(cache.full)}, "
        f"{cache.share:.0%}; the least is {size(cache.least)}), and the others on disk"
    )


def expert_use(hits: int, misses: int, nbytes: int, seconds: float) -> str:
    """Say how the experts that were used were found."""
    share = 100 * hits / max(1, hits + misses)
    return (
        f"expert cache: {share:.1f}% of {hits + misses:,} uses in memory, {size(nbytes)} read "
        f"from disk, {seconds:.1f} s waited"
    )


def size(count: int) -> str:
    """Format a number of bytes as GiB, MiB or KiB."""
    for unit, width in (("GiB", 30), ("MiB", 20)):
        if count >= 2**width:
            return f"{count / 2**width:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"
