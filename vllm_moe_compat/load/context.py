"""What the first hook leaves for the second, and what a load was.

``load_config`` sees the checkpoint's folder and its config; ``sanitize`` sees
neither. ``prepare`` therefore makes the plan in the first and leaves it in a
context variable, together with a description of every tensor, by which the
second can tell that it was given that checkpoint and no other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_moe_compat.checkpoint.config import quantization_configs
from vllm_moe_compat.checkpoint.headers import TensorInfo, read_headers, weight_files
from vllm_moe_compat.checkpoint.index import INDEX, check_index
from vllm_moe_compat.checkpoint.layout import Layout, detect
from vllm_moe_compat.checkpoint.names import fold
from vllm_moe_compat.envs import QUANTIZE
from vllm_moe_compat.errors import CheckpointFileError, UnsupportedCheckpointError
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.load.report import LoadReport
from vllm_moe_compat.plan.packing import QUANTIZE_SETTINGS, Requantize
from vllm_moe_compat.plan.planner import Plan, make_plan

_BYTES = ("U8", "F8_E4M3", "F8_E5M2", "F8_E8M0")

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
        sizes: the shards' sizes in bytes, when the plan was made.
        setting: to what weights are quantised; ``none`` or a key of ``QUANTIZE_SETTINGS``.
        ignored: names of tensors that play no part in the model.
    """

    model_dir: Path
    row: Row
    plan: Plan
    tensors: Mapping[str, TensorInfo]
    original_config: Mapping[str, Any]
    config: dict[str, Any]
    sizes: Mapping[str, int] = field(default_factory=dict)
    setting: str = "none"
    ignored: frozenset[str] = frozenset()

    def check_files(self) -> None:
        """See that the shards are as they were when their headers were read.

        Raises:
            CheckpointFileError: one was cut, replaced or removed since.
        """
        for path in weight_files(self.model_dir):
            size, was = path.stat().st_size, self.sizes.get(path.name)
            if was != size:
                raise CheckpointFileError(
                    f"{path.name}: has {size:,} bytes, where {was or 0:,} were expected since its "
                    "header was read; something is writing to the checkpoint, so load it again "
                    "when that has ended."
                )

    def matches(self, given: Mapping[str, TensorInfo]) -> bool:
        """Whether ``given``, described by MLX, are this checkpoint's tensors.

        MLX calls FP8 ``U8``; a dtype of ours that it has no name for says nothing.
        """
        if self.tensors.keys() != given.keys():
            return False
        sources = [name for build in self.plan.builds for name in (*build.weights, *build.scales)]
        return all(
            given[name].shape == self.tensors[name].shape
            and (given[name].dtype == "U8") == (self.tensors[name].dtype in _BYTES)
            for name in sources
        )


current: ContextVar[LoadContext | None] = ContextVar("vllm_moe_compat_load", default=None)
serving_dtype: ContextVar[str | None] = ContextVar("vllm_moe_compat_dtype", default=None)
deferred: ContextVar[Callable[..., Any] | None] = ContextVar(
    "vllm_moe_compat_deferred", default=None
)
"""Called in place of ``requantize.execute``, by who wants tensors one at a time."""

aside: ContextVar[bool] = ContextVar("vllm_moe_compat_aside", default=False)

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


@contextmanager
def standing_aside() -> Iterator[None]:
    """Have the hooks call on and do nothing inside, in this thread."""
    token = aside.set(True)
    try:
        yield
    finally:
        aside.reset(token)


@contextmanager
def unseen() -> Iterator[None]:
    """Leave no trace of the loads inside in ``last_report``, nor in the kept plan."""
    global _last, _cached
    before = _last, _cached, current.get()
    try:
        yield
    finally:
        _last, _cached = before[:2]
        current.set(before[2])


def last_report() -> LoadReport | None:
    """Return what was done in this process's last load, or None before the first."""
    return _last


def remember(report: LoadReport) -> None:
    """Keep the report for ``last_report``."""
    global _last
    _last = report


def prepare(
    model_dir: Path,
    config: dict[str, Any],
    row: Row,
    setting: str = "none",
    *,
    original: Mapping[str, Any] | None = None,
    exact: bool = False,
) -> LoadContext:
    """Plan the load of a checkpoint and normalise its config in place.

    mlx-lm reads the config of one load twice, so the last plan is kept, by the
    files' names, sizes and times.

    Args:
        model_dir: the checkpoint's folder.
        config: as mlx-lm goes on with it, in the words of the row's module.
        row: of the class that is being loaded.
        setting: to what weights are quantised.
        original: the config as it was read; a copy of ``config`` by default.
        exact: whether bfloat16 products are too coarse for what will be served.

    Raises:
        CheckpointFileError: a file is missing, damaged or contradicts the index.
        LayoutError: the tensors contradict each other or the config.
        UnsupportedCheckpointError: a form that is not served.
    """
    global _cached
    key = (_fingerprint(model_dir), row.module, setting, exact, repr(config))
    if _cached is not None and _cached[0] == key:
        context = replace(_cached[1], config=config)
    else:
        tensors = read_headers(model_dir)
        layout = detect(tensors, config, row.ignored)
        check_index(model_dir, tensors, row.ignored.of(config))
        if setting != "none":
            refuse_quantized(model_dir, config, layout)
        plan = make_plan(layout, row, config, split=setting != "none", exact=exact)
        original = copy.deepcopy(config) if original is None else original
        sizes = {path.name: path.stat().st_size for path in weight_files(model_dir)}
        context = LoadContext(
            model_dir, row, plan, tensors, original, config, sizes, setting, layout.ignored
        )
        _cached = (key, replace(context, config={}))
    if setting != "none":
        announce(config, QUANTIZE_SETTINGS[setting])
    elif context.plan.dequantized:
        normalize(config)
    return context


def refuse_quantized(model_dir: Path, config: Mapping[str, Any], layout: Layout) -> None:
    """Refuse to quantise what is quantised already in a form that is not dequantised here.

    Raises:
        UnsupportedCheckpointError: by the config, or by the tensors.
    """
    method = next((c.get("quant_method", "unnamed") for c in quantization_configs(config)), None)
    if layout.fp8.pairs and method in ("compressed-tensors", "modelopt"):
        method = "fp8"
    what = ""
    if config.get("quantization") is not None:
        what = "config.json has `quantization`"
    elif method not in (None, "fp8", DEQUANTIZED):
        what = f"config.json says quant_method {method!r}"
    elif not layout.fp8.pairs and (model_dir / "hf_quant_config.json").exists():
        what = "it has an hf_quant_config.json"
    elif found := [n for n in layout.tensors if n.endswith((".scales", ".weight_packed"))]:
        what = f"it holds {fold(found)}"
    if what:
        raise UnsupportedCheckpointError(
            f"{model_dir}: the checkpoint is quantised already ({what}), where bf16 or block-FP8 "
            f"weights were expected; unset {QUANTIZE.name} to load it as it is."
        )


def announce(config: dict[str, Any], packing: Requantize) -> None:
    """Have ``load_model`` quantise its modules, and return a config that says so."""
    config["quantization"] = dict(packing.config)
    # The same dict twice, as mlx-lm itself has it: modules in a format of their own
    # are added when the model is there.
    config["quantization_config"] = config["quantization"]
    if isinstance(text := config.get("text_config"), dict):
        text.pop("quantization_config", None)
        text.pop("quantization", None)


def spared(config: Mapping[str, Any], setting: str) -> tuple[str, ...]:
    """Return the ``modules_to_not_convert`` that this setting leaves as they are.

    Eight bits cost what the checkpoint's own FP8 costs or less; fewer bits cost more
    than whoever listed the modules had in mind.
    """
    if setting not in ("6bit", "4bit"):
        return ()
    return tuple(
        entry
        for found in quantization_configs(config)
        if isinstance(entries := found.get("modules_to_not_convert"), list)
        for entry in entries
        if isinstance(entry, str)
    )


def spared_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], setting: str
) -> set[str]:
    """Return the tensors whose modules the setting leaves as they are.

    A module that has no entry of its own in the list is spared with its parent.
    """
    entries = spared(config, setting)
    return {
        name
        for name, info in tensors.items()
        if entries and info.dtype != "F8_E4M3" and is_listed(name.removesuffix(".weight"), entries)
    }


def is_listed(module: str, entries: Collection[str]) -> bool:
    """Whether an entry of ``modules_to_not_convert`` names the module, its parent or its end."""
    return any(
        module == entry or module.startswith(f"{entry}.") or module.endswith(f".{entry}")
        for entry in entries
    )


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
    weights = len(fp8.pairs) + len(fp8.bare)
    found = {f"{weights:,} FP8 weights": weights, f"{per_expert:,} per-expert weights": per_expert}
    return " and ".join(words for words, count in found.items() if count) or None
