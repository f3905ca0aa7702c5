"""What the first hook leaves for the second, and what a load was.

``load_config`` sees the checkpoint's folder and its config; ``sanitize`` sees
neither. ``prepare`` therefore makes the plan in the first and leaves it in a
context variable, together with a description of every tensor, by which the
second can tell that it was given that checkpoint and no other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_moe_compat.layout import Layout, TensorInfo, check_index, detect, read_headers
from vllm_moe_compat.layout.headers import INDEX, weight_files
from vllm_moe_compat.plan import Plan, Row, make_plan

DEQUANTIZED = "dequantized"
"""The ``quant_method`` that our configs name: no branch of mlx-lm answers to it."""


@dataclass(frozen=True, slots=True)
class LoadContext:
    """A load under way.

    Attributes:
        model_dir: the checkpoint's folder.
        row: of the class that is being loaded.
        plan: what will be done to the tensors.
        tensors: every tensor of the shards, the ignored ones too.
        original_config: the config as it was read.
        config: the dict that mlx-lm goes on with, normalised.
    """

    model_dir: Path
    row: Row
    plan: Plan
    tensors: Mapping[str, TensorInfo]
    original_config: Mapping[str, Any]
    config: dict[str, Any]

    def matches(self, given: Mapping[str, TensorInfo]) -> bool:
        """Whether ``given``, described by MLX, are this checkpoint's tensors.

        MLX calls FP8 ``U8``; a dtype of ours that it has no name for says nothing.
        """
        if self.tensors.keys() != given.keys():
            return False
        sources = [name for build in self.plan.builds for name in (*build.weights, *build.scales)]
        return all(
            given[name].shape == self.tensors[name].shape
            and (given[name].dtype == "U8") == (self.tensors[name].dtype in ("U8", "F8_E4M3"))
            for name in sources
        )


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
        dtype: what they became; None if there were none.
        seconds: how long it took.
    """

    path: str | None
    module: str
    words: str
    experts: int
    layers: int
    dequantized: int
    dtype: str | None
    seconds: float

    def __str__(self) -> str:
        done = []
        if self.layers:
            done.append(f"stacked {self.experts} experts x {self.layers} layers")
        if self.dequantized:
            done.append(f"dequantised {self.dequantized:,} tensors to {self.dtype}")
        what = ", ".join(done) + f" in {self.seconds:.1f} s" if done else "left as it is"
        return f"{self.path or 'weights without a path'} ({self.module}): {self.words}; {what}"


current: ContextVar[LoadContext | None] = ContextVar("vllm_moe_compat_load", default=None)
serving_dtype: ContextVar[str | None] = ContextVar("vllm_moe_compat_dtype", default=None)

_last: LoadReport | None = None
_cached: tuple[object, LoadContext] | None = None


@contextmanager
def serving_dtype_as(dtype: str) -> Iterator[None]:
    """Let FP8 weights loaded inside become ``dtype``, unless the user set another."""
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"{dtype!r} is no dtype to serve in; use bfloat16, float16 or float32.")
    token = serving_dtype.set(dtype)
    try:
        yield
    finally:
        serving_dtype.reset(token)


def last_report() -> LoadReport | None:
    """Return what was done in this process's last load, or None before the first."""
    return _last


def remember(report: LoadReport) -> None:
    """Keep the report for ``last_report``."""
    global _last
    _last = report


def prepare(model_dir: Path, config: dict[str, Any], row: Row) -> LoadContext:
    """Plan the load of a checkpoint and normalise its config in place.

    mlx-lm reads the config of one load twice, so the last plan is kept, by the
    files' names, sizes and times.

    Raises:
        CheckpointFileError: a file is missing, damaged or contradicts the index.
        LayoutError: the tensors contradict each other or the config.
        UnsupportedCheckpointError: a form that is not served.
    """
    global _cached
    key = (_fingerprint(model_dir), row, repr(config))
    if _cached is not None and _cached[0] == key:
        context = replace(_cached[1], config=config)
    else:
        tensors = read_headers(model_dir)
        layout = detect(tensors, config, row.ignored)
        check_index(model_dir, tensors, row.ignored)
        plan = make_plan(layout, row, config)
        original = copy.deepcopy(config)
        context = LoadContext(model_dir, row, plan, tensors, original, config)
        _cached = (key, replace(context, config={}))
    if context.plan.dequantized:
        normalize(config)
    return context


def normalize(config: dict[str, Any]) -> None:
    """Make ``load_model`` treat the weights as what they will be: not quantised.

    ``quantization_config`` is replaced, never deleted: without one, mlx-lm looks
    for the next in ``text_config`` and in ``hf_quant_config.json``.
    """
    text = config.get("text_config")
    for section in (config, text):
        if isinstance(section, dict) and (section is config or "quantization_config" in section):
            was = section.get("quantization_config")
            block = was.get("weight_block_size") if isinstance(was, dict) else None
            section["quantization_config"] = {
                "quant_method": DEQUANTIZED,
                **({"weight_block_size": block} if block is not None else {}),
            }


def _fingerprint(model_dir: Path) -> tuple[object, ...]:
    files = [*weight_files(model_dir), model_dir / "config.json", model_dir / INDEX]
    stats = ((path.name, path.stat()) for path in files if path.exists())
    return (model_dir.resolve(), *((name, s.st_size, s.st_mtime_ns) for name, s in stats))


def at_risk(layout: Layout) -> str | None:
    """Say which tensors mlx-lm may not digest without us; None if there are none."""
    fp8, per_expert = layout.fp8, len(layout.per_expert)
    weights = len(fp8.pairs) + len(fp8.bare) + len(fp8.other)
    found = {f"{weights:,} FP8 weights": weights, f"{per_expert:,} per-expert weights": per_expert}
    return " and ".join(words for words, count in found.items() if count) or None
