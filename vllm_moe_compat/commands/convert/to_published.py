"""Convert a checkpoint to a form that authors publish: per expert, combined, FP8 or floats.

The rewrite room plans the tensors: names and norms stay as in the source, tensors in the
wanted form are copied, and FP8 is copied where the blocks agree. If the source is FP8, the
same matrices stay FP8. Otherwise the experts and the larger projections become FP8, and
config.json lists the other modules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from vllm_moe_compat.checkpoint.config_file import read_config
from vllm_moe_compat.checkpoint.headers import TensorInfo, weight_files
from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.checkpoint.names import layer_of
from vllm_moe_compat.checkpoint.numbers import FORMS
from vllm_moe_compat.checkpoint.operations import Spec
from vllm_moe_compat.commands.convert.source import Source
from vllm_moe_compat.dtypes import STORED_NAMES
from vllm_moe_compat.errors import LayoutError, UnsupportedCheckpointError
from vllm_moe_compat.plan.estimate import nbytes
from vllm_moe_compat.plan.heads import KEY as TYING
from vllm_moe_compat.plan.heads import apply_tying
from vllm_moe_compat.plan.make import make
from vllm_moe_compat.plan.planned_load import PlannedLoad, read_headers_of
from vllm_moe_compat.plan.serving import Serving
from vllm_moe_compat.rewrite.outcome import results
from vllm_moe_compat.rewrite.planner import plan_rewrite
from vllm_moe_compat.rewrite.run_rewrite import run_rewrite
from vllm_moe_compat.rewrite.steps import RewritePlan
from vllm_moe_compat.rewrite.written_layout import WrittenLayout

SMALLEST = 128
"""Minimum number of rows and of columns of a projection that becomes FP8."""

# Not routers, which are small and sensitive, and not embeddings and output heads.
_LINEAR = re.compile(
    r"(?!.*(?:vis|lm_head|embed|router|projector|index))"
    r".*\.(?:\w+_proj(?:_with_mqa)?|in_proj_\w+|c_\w+|fc\d|w[123q]\w*"
    r"|\w+_linear|dense\w*)\.weight"
)


def published_source(folder: Path, wanted: WrittenLayout, dtype: str) -> Source:
    """Plan the conversion.

    Args:
        folder: the checkpoint.
        wanted: the layout to write.
        dtype: the dtype of dequantised weights where floats are written.

    Raises:
        CheckpointFileError: a file is missing, damaged or contradicts the index.
        LayoutError: the tensors contradict each other or the config.
        SettingError: the module has nothing of the kind that the layout names.
        UnsupportedCheckpointError: a form that is not read, or cannot be written.
    """
    config = read_config(folder)
    planned = _planned(folder, config, dtype)
    headers, layout, row = planned.headers.tensors, planned.layout, planned.row
    if row is None or layout is None:
        raise UnsupportedCheckpointError(
            f"{folder}: model_type {config.get('model_type')!r} is not in the map of supported "
            "modules; convert it to MLX form, without --layout and --fp8."
        )
    assert planned.plan is not None, "it was not refused"
    names = planned.plan.names
    plan = plan_rewrite(layout, row, planned.config, wanted, _linear(layout, wanted))
    specs = _specs(plan, layout, STORED_NAMES[dtype])
    written = _config(config, wanted, specs)
    if TYING in planned.translated:
        apply_tying(written, planned.config[TYING])
    notes = []
    if layout.ignored:
        notes.append(
            f"{len(layout.ignored):,} tensors that the text model does not use (prediction heads, "
            "vision towers) are not written"
        )

    def stream(skip: Collection[str]) -> Iterator[tuple[str, mx.array]]:
        weights: dict[str, mx.array] = {}
        for path in weight_files(folder):
            weights.update(mx.load(str(path)))  # type: ignore[arg-type]
        names.apply(weights)
        for name in (*layout.ignored, *layout.numbers.unused):
            weights.pop(name, None)
        files = {name: info.file for name, info in headers.items()}
        for name, array in run_rewrite(plan.without(skip), weights, dtype, files):
            if name in skip:
                continue
            mx.eval(array)
            yield name, array
            del array

    def save_config(partial: Path) -> None:
        text = json.dumps(written, indent=2, ensure_ascii=False) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")

    def check(partial: Path) -> None:
        """Check that a load of the result can be planned."""
        _planned(partial, written, dtype)

    words = "floats" if wanted.numbers is None else wanted.numbers.words
    return Source(
        specs=specs,
        stream=stream,
        save_config=save_config,
        kind="pt",
        form=f"{wanted.experts}, {words}",
        read=sum(nbytes(info) for name, info in headers.items() if name not in layout.ignored),
        notes=notes,
        check=check,
    )


def _planned(folder: Path, config: Mapping[str, Any], dtype: str) -> PlannedLoad:
    """Plan a load of the folder that leaves no arithmetic to upstream.

    Raises:
        CompatError: it would be refused.
    """
    planned = make(read_headers_of(folder), config, Serving(dtype, dtype, exact=True))
    planned.refuse()
    return planned


def _linear(layout: Layout, wanted: WrittenLayout) -> Callable[[str], bool]:
    """Return whether a float weight that is no expert gets the wanted number form."""
    if wanted.numbers is None or layout.numbers.weights:
        return lambda name: False

    def chosen(name: str) -> bool:
        info = layout.tensors.get(name)
        large = info is None or (len(info.shape) == 2 and min(info.shape) >= SMALLEST)
        return large and layer_of(name) is not None and _LINEAR.fullmatch(name) is not None

    return chosen


def _specs(plan: RewritePlan, layout: Layout, dtype: str) -> dict[str, Spec]:
    """Return every tensor to write, in the order of the plan."""
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


def _config(
    config: Mapping[str, Any], wanted: WrittenLayout, specs: Mapping[str, Spec]
) -> dict[str, Any]:
    """Return the source's config with the ``quantization_config`` of the result."""
    written: dict[str, Any] = json.loads(json.dumps(config))
    for section in (written, written.get("text_config")):
        if isinstance(section, dict):
            section.pop("quantization_config", None)
            section.pop("quantization", None)
    if wanted.numbers is not None:
        dtypes = {dtype for form in FORMS for dtype in form.dtypes}
        kept = {
            name.removesuffix(".weight")
            for name, spec in specs.items()
            if name.endswith(".weight") and len(spec.shape) > 1 and spec.dtype not in dtypes
        }
        written["quantization_config"] = wanted.numbers.quantization_config(kept)
    return written
