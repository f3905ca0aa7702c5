"""A checkpoint in a form that authors publish: per expert, combined, FP8 or floats.

What is done to the tensors is ``plan.inverse``'s: names and norms stay those of the
source, what is in the wanted form already is copied, and FP8 moves as it is where the
blocks agree. Which matrices become FP8 is the author's choice where the source is FP8;
else they are the experts and the larger projections, and config.json says which are not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from vllm_moe_compat.checkpoint.config_file import read_config
from vllm_moe_compat.checkpoint.headers import TensorInfo, read_headers, weight_files
from vllm_moe_compat.checkpoint.index import check_index
from vllm_moe_compat.checkpoint.layout import Layout, detect
from vllm_moe_compat.commands.convert.source import Source
from vllm_moe_compat.errors import LayoutError, UnsupportedCheckpointError
from vllm_moe_compat.families import registry
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan.estimate import nbytes
from vllm_moe_compat.plan.planner import make_plan
from vllm_moe_compat.plan.specs import Spec
from vllm_moe_compat.rewrite import run_rewrite as rewrite
from vllm_moe_compat.rewrite.outcome import results
from vllm_moe_compat.rewrite.planner import Rewriting, plan_rewriting
from vllm_moe_compat.rewrite.written_layout import Form

SMALLEST = 128
"""Rows and columns that a projection has at least if it is to become FP8."""

# Gates and routers decide much and weigh little; embeddings and heads are looked up.
_LINEAR = re.compile(
    r"(?!.*(?:vis|lm_head|embed|router|projector|index))"
    r".*\.(?:layers|h)\.\d+\..*\.(?:\w+_proj(?:_with_mqa)?|in_proj_\w+|c_\w+|fc\d|w[123q]\w*"
    r"|\w+_linear|dense\w*)\.weight"
)
_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def prepare(folder: Path, form: Form, dtype: str) -> Source:
    """Plan the conversion.

    Args:
        folder: the checkpoint.
        form: the wanted one.
        dtype: what FP8 becomes where the form is floats.

    Raises:
        CheckpointFileError: a file is missing, damaged or contradicts the index.
        LayoutError: the tensors contradict each other or the config.
        SettingError: the module has nothing of the kind that the form names.
        UnsupportedCheckpointError: a form that is not read, or cannot be written.
    """
    config = read_config(folder)
    row, fixed = _row(folder, config)
    headers = read_headers(folder)
    layout = detect(headers, fixed, row.ignored)
    check_index(folder, headers, row.ignored.of(fixed))
    linear = _linear(layout, form)
    plan = plan_rewriting(layout, row, fixed, form, linear)
    specs = _specs(plan, layout, _NAMES[dtype])
    written = _config(config, form, specs)
    ignored = sorted(layout.ignored)
    notes = []
    if ignored:
        notes.append(
            f"{len(ignored):,} tensors that the text model does not use (prediction heads, vision "
            "towers) are not written"
        )

    def stream() -> Iterator[tuple[str, mx.array]]:
        weights: dict[str, mx.array] = {}
        for path in weight_files(folder):
            weights.update(mx.load(str(path)))  # type: ignore[arg-type]
        for name in (*layout.ignored, *layout.fp8.static):
            weights.pop(name, None)
        files = {name: info.file for name, info in headers.items()}
        for name, array in rewrite.carry_out(plan, weights, dtype, files):
            mx.eval(array)
            yield name, array
            del array

    def save_config(partial: Path) -> None:
        text = json.dumps(written, indent=2, ensure_ascii=False) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")

    def check(partial: Path) -> None:
        """See that what was laid out can be planned for by a load."""
        again = dict(written)
        registry.fix_config(row, again)
        make_plan(detect(read_headers(partial), again, row.ignored), row, again)

    words = form.layout if form.block is None else f"{form.layout}, FP8 {_block_words(form)}"
    return Source(
        specs=specs,
        stream=stream,
        save_config=save_config,
        kind="pt",
        form=words if form.block is not None else f"{words}, floats",
        read=sum(nbytes(info) for name, info in headers.items() if name not in layout.ignored),
        notes=notes,
        check=check,
    )


def _row(folder: Path, config: Mapping[str, Any]) -> tuple[Row, dict[str, Any]]:
    """Return what is known about the module, and the config in its words."""
    import mlx_lm.utils

    row = registry.row_of_config(config, mlx_lm.utils.MODEL_REMAPPING)
    if row is None:
        raise UnsupportedCheckpointError(
            f"{folder}: model_type {config.get('model_type')!r} is not in the map of supported "
            "modules, where one that is was expected; only MLX form can be written of it."
        )
    fixed: dict[str, Any] = json.loads(json.dumps(config))
    registry.fix_config(row, fixed)
    return row, fixed


def _linear(layout: Layout, form: Form) -> Callable[[str], bool]:
    """Return which weights become FP8 that are none and no experts."""
    if form.block is None or layout.fp8.pairs:
        return lambda name: False

    def chosen(name: str) -> bool:
        info = layout.tensors.get(name)
        large = info is None or (len(info.shape) == 2 and min(info.shape) >= SMALLEST)
        return large and _LINEAR.fullmatch(name) is not None

    return chosen


def _specs(plan: Rewriting, layout: Layout, dtype: str) -> dict[str, Spec]:
    """Return every tensor that will be written, in the order of the work."""
    specs: dict[str, Spec] = {}

    def add(name: str, spec: Spec) -> None:
        if specs.setdefault(name, spec) is not spec:
            raise LayoutError(
                f"{name} would be written twice, where one tensor of that name was expected; start "
                "from the model's own release."
            )

    for step in plan.steps:
        for name, spec in results(step, layout.tensors, dtype):
            add(name, spec)
    for name in plan.kept:
        info: TensorInfo = layout.tensors[name]
        add(name, Spec(info.dtype, info.shape))
    return specs


def _block_words(form: Form) -> str:
    assert form.block is not None
    known = {(1, 0): "per row", (0, 0): "per tensor"}
    return known.get(form.block, "x".join(map(str, form.block)))


def _config(config: Mapping[str, Any], form: Form, specs: Mapping[str, Spec]) -> dict[str, Any]:
    """Return the author's config, saying how the weights are stored now."""
    written: dict[str, Any] = json.loads(json.dumps(config))
    for section in (written, written.get("text_config")):
        if isinstance(section, dict):
            section.pop("quantization_config", None)
            section.pop("quantization", None)
    if form.block is not None:
        written["quantization_config"] = describe(form, specs)
    return written


def describe(form: Form, specs: Mapping[str, Spec]) -> dict[str, Any]:
    """Return the ``quantization_config`` of what is written."""
    kept = sorted(
        name.removesuffix(".weight")
        for name, spec in specs.items()
        if name.endswith(".weight") and len(spec.shape) > 1 and spec.dtype != "F8_E4M3"
    )
    if form.block == (1, 0):
        shared = {"num_bits": 8, "type": "float", "symmetric": True}
        group = {
            "targets": ["Linear"],
            "weights": shared | {"strategy": "channel", "dynamic": False},
            "input_activations": shared | {"strategy": "token", "dynamic": True},
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": kept,
        }
    described: dict[str, Any] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "modules_to_not_convert": kept,
    }
    if form.block != (0, 0):
        described["weight_block_size"] = list(form.block or ())
    if form.e8m0:
        described["scale_fmt"] = "ue8m0"
    return described
