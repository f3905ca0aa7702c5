"""An expert read by itself has the bytes that a whole load gives it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from support.fp4 import cell
from support.packed import PackedForm, awq_form, gptq_form, int_form, pack_form
from support.stored import bits, stored
from vllm_moe_compat.checkpoint.headers import TensorInfo, read_headers
from vllm_moe_compat.checkpoint.layout import detect
from vllm_moe_compat.checkpoint.numbers import find_numbers
from vllm_moe_compat.checkpoint.numbers.fp8_ops import DequantizeFp8, scale_grid
from vllm_moe_compat.execute.build_tensor import make_build
from vllm_moe_compat.execute.quantize import PackedBuild
from vllm_moe_compat.execute.run_plan import tensor_infos
from vllm_moe_compat.execute.stored_tensors import StoredTensors
from vllm_moe_compat.expert_cache import read_tasks, source
from vllm_moe_compat.expert_cache.protocol import Spec
from vllm_moe_compat.expert_cache.source import FileSource
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.plan.build import Build
from vllm_moe_compat.plan.ops import SplitGateUp, StackExperts, Transpose
from vllm_moe_compat.plan.packing import QUANTIZE_SETTINGS, Packing
from vllm_moe_compat.plan.planner import make_plan


@pytest.fixture(params=[2**18, 300], ids=["whole", "bands"])
def _bands(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices are converted at once, or a few rows at a time."""
    monkeypatch.setattr(read_tasks, "_BAND", request.param)


E, ROWS, COLUMNS = 5, 48, 64
PATH = "layer.switch_mlp"


def packed_build(
    build: Build, formats: Sequence[Packing | None] = (), dtype: str = "bfloat16"
) -> PackedBuild:
    return PackedBuild(build, build.targets, tuple(formats) or (None,) * len(build.targets), dtype)


def whole_of(
    builds: Sequence[PackedBuild], sources: Mapping[str, Any], path: str
) -> dict[str, mx.array]:
    """What a whole load makes of them, by the names within the container."""
    made: dict[str, mx.array] = {}
    for packed in builds:
        made |= make_build(
            packed.build,
            dict(sources),
            packed.dtype,
            names=packed.names,
            formats=packed.formats,
        )
    return {name.removeprefix(f"{path}."): array for name, array in made.items()}


def check(
    files: StoredTensors,
    builds: Sequence[PackedBuild],
    path: str = PATH,
    held: mx.Dtype | None = None,
) -> FileSource:
    """Compare every expert, one by one and together, with the whole; return the source."""
    wanted = whole_of(builds, files, path)
    if held is not None:
        wanted = {name: array.astype(held) for name, array in wanted.items()}
    specs = {name: Spec(tuple(a.shape[1:]), a.dtype) for name, a in wanted.items()}
    found = FileSource(files, path, builds, specs)
    assert found.experts == len(next(iter(wanted.values())))
    assert found.nbytes * found.experts == sum(array.nbytes for array in wanted.values())
    each = [*range(found.experts)]
    for asked in ([each[-1]], each, each[::-2]):
        slots = {
            e: {n: np.full(a.nbytes // found.experts, 0xA5, np.uint8) for n, a in wanted.items()}
            for e in asked
        }
        assert found.read(asked, slots.__getitem__) == {}
        for expert, views in slots.items():
            for name, view in views.items():
                assert view.tobytes() == bits(wanted[name][expert]).tobytes(), (name, expert)
    return found


LAYOUTS = ["per-expert", "combined", "gate_up", "interleaved", "transposed", "turned gate_up"]


def a_build(layout: str, block: tuple[int, int] | None, kind: str) -> tuple[Build, Any, Any]:
    """A build of ``[E, ROWS, COLUMNS]``, its sources, and how headers describe them."""
    rng = np.random.default_rng(0)
    shape: tuple[int, ...] = (E, ROWS, COLUMNS)
    after: tuple[Any, ...] = ()
    others: tuple[str, ...] = ()
    if layout in ("gate_up", "interleaved", "turned gate_up"):
        shape, others = (E, 2 * ROWS, COLUMNS), (f"{PATH}.up_proj.weight",)
        after = (SplitGateUp(layout == "interleaved"),)
    if layout in ("transposed", "turned gate_up"):
        shape, after = (E, *shape[:0:-1]), (Transpose(), *after)
    names = [f"e{e}" for e in range(E)] if layout == "per-expert" else ["all"]
    each = shape[1:] if layout == "per-expert" else shape
    ops: tuple[Any, ...] = (StackExperts(E),) if layout == "per-expert" else ()
    sources, tensors = {}, {}
    for name in names:
        if block is None:
            values = rng.standard_normal(each).astype(np.float32)
            dtype = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}[kind]
            sources[name] = mx.array(values).astype(dtype)
            tensors[name] = TensorInfo(kind, each)
            continue
        sources[name] = mx.array(rng.integers(0, 120, each, dtype=np.uint8))
        tensors[name] = TensorInfo("F8_E4M3", each)
        grid = scale_grid(each, block)
        sources[f"{name}_s"] = mx.array(rng.uniform(0.5, 2, grid).astype(np.float32))
        tensors[f"{name}_s"] = TensorInfo("F32", grid)
    parts: tuple[Any, ...] = ()
    if block is not None:
        parts = (("scale", tuple(f"{name}_s" for name in names)),)
        ops += (DequantizeFp8(block),)
    build = Build(f"{PATH}.gate_proj.weight", tuple(names), parts, (*ops, *after), others)
    return build, sources, tensors


@pytest.mark.usefixtures("_bands")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("kind", "held"),
    [("BF16", mx.bfloat16), ("BF16", mx.float32), ("F16", mx.float32), ("F32", mx.float32),
     ("F16", mx.bfloat16)],
)  # fmt: skip
def test_floats(tmp_path: Path, layout: str, kind: str, held: mx.Dtype):
    build, sources, tensors = a_build(layout, None, kind)
    check(stored(tmp_path, sources, tensors), [packed_build(build)], held=held)


@pytest.mark.usefixtures("_bands")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [(16, 16), (128, 128), (1, COLUMNS), (5, 7)])
@pytest.mark.parametrize(
    ("dtype", "held"),
    [("bfloat16", mx.bfloat16), ("bfloat16", mx.float32), ("float32", mx.float32),
     ("float16", mx.float16)],
)  # fmt: skip
def test_fp8(tmp_path: Path, layout: str, block: tuple[int, int], dtype: str, held: mx.Dtype):
    build, sources, tensors = a_build(layout, block, "")
    check(stored(tmp_path, sources, tensors), [packed_build(build, dtype=dtype)], held=held)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [None, (16, 16)])
@pytest.mark.parametrize("setting", ["4bit", "mxfp8"])
def test_what_is_cached_is_quantised_as_the_load_would(
    tmp_path: Path, layout: str, block: tuple[int, int] | None, setting: str
):
    build, sources, tensors = a_build(layout, block, "BF16")
    formats = [QUANTIZE_SETTINGS[setting]] * len(build.targets)
    check(stored(tmp_path, sources, tensors), [packed_build(build, formats)])


@pytest.mark.usefixtures("_bands")
@pytest.mark.parametrize("interleaved", [None, False, True])
@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("held", [mx.bfloat16, mx.float32])
def test_biases(tmp_path: Path, interleaved: bool | None, combined: bool, held: mx.Dtype):
    split = () if interleaved is None else (SplitGateUp(interleaved, -1),)
    others = () if interleaved is None else (f"{PATH}.up_proj.bias",)
    whole = mx.random.normal((E, 2 * ROWS)).astype(mx.bfloat16)
    sources = {"all": whole} if combined else {f"e{n}": whole[n] for n in range(E)}
    ops = (*(() if combined else (StackExperts(E),)), *split)
    build = Build(f"{PATH}.gate_proj.bias", tuple(sources), (), ops, others)
    tensors = {name: TensorInfo("BF16", tuple(a.shape)) for name, a in sources.items()}
    check(stored(tmp_path, sources, tensors), [packed_build(build)], held=held)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4", "mxfp8"])
def test_folders_in_mlx_form(tmp_path: Path, mode: str):
    group, width = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}[mode]
    whole = mx.random.normal((E, ROWS, COLUMNS)).astype(mx.bfloat16)
    packed = mx.quantize(whole, group, width, mode=mode)
    sources = {
        f"{PATH}.gate_proj.{kind}": array
        for kind, array in zip(("weight", "scales", "biases"), packed, strict=False)
    }
    builds = [packed_build(Build(name, (name,), (), ())) for name in sources]
    files = stored(tmp_path, sources, tensor_infos(sources))
    found = check(files, builds)
    before = files.bytes_read
    before = files.bytes_read
    found.read([2], lambda _: {n: np.empty(_size(s), np.uint8) for n, s in found.specs.items()})
    assert files.bytes_read - before == found.nbytes


def _size(spec: Spec) -> int:
    return int(np.prod(spec.shape)) * spec.dtype.size


INTS = [pack_form(4, 32), pack_form(8, 64), pack_form(4, 32, dtype=np.float32),
        pack_form(4, 32, symmetric=False), pack_form(4, 32, order=True), pack_form(8, 0),
        int_form(), gptq_form(3, 32), gptq_form(), gptq_form(4, 32, order=True),
        awq_form()]  # fmt: skip


@pytest.mark.parametrize("hold", [False, True], ids=["floats", "held"])
@pytest.mark.parametrize("form", INTS, ids=lambda form: form.name)
def test_packed_integers(tmp_path: Path, form: PackedForm, hold: bool):
    sources, build = ints(form)
    if hold and build.held is None:
        return
    files = stored(tmp_path, sources, tensor_infos(sources))
    check(files, [packed_build(build, [build.held] if hold else ())])


@pytest.mark.parametrize("form", [pack_form(4, 32), pack_form(4, 32, symmetric=False)])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_packed_integers_of_gate_and_up_together(tmp_path: Path, form: PackedForm, dtype: mx.Dtype):
    sources, build = ints(form, SplitGateUp(), dtype=dtype)
    assert build.held is not None
    files = stored(tmp_path, sources, tensor_infos(sources))
    check(files, [packed_build(build, [build.held] * 2)])


def ints(
    form: PackedForm, *after: SplitGateUp, dtype: mx.Dtype | None = None
) -> tuple[dict[str, mx.array], Build]:
    """Per-expert weights in a form, their scales perhaps in another dtype, and their build."""
    generator = np.random.default_rng(5)
    names = [f"experts.{e}.up.weight" for e in range(E)]
    state = {}
    for name in names:
        state |= form.store(name, form.draw(generator, 64, 128))
    sources = {name: mx.array(value.numpy()) for name, value in state.items()}
    for name in [n for n in sources if dtype is not None and n.endswith("_scale")]:
        sources[name] = sources[name].astype(dtype)
    numbers = find_numbers(tensor_infos(sources), {"quantization_config": form.config})
    op = numbers.dequantize(names[0])
    assert op is not None
    each = [numbers.stored(name) for name in names]
    parts = tuple((role, tuple(dict(one.parts)[role] for one in each)) for role, _ in each[0].parts)
    others = (f"{PATH}.gate_proj.weight",) if after else ()
    ops = (StackExperts(E), op, *after)
    weights = tuple(one.tensor for one in each)
    target = f"{PATH}.up_proj.weight"
    return sources, Build(target, weights, parts, ops, others, held=op.held)


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("qwen3_moe", "NVFP4"),
        ("qwen3_moe", "ModelOpt NVFP4 combined"),
        ("qwen3_moe", "MXFP4"),
        ("llama4", "ModelOpt NVFP4 combined"),  # stored turned
    ],
)
def test_fp4(tmp_path: Path, family: str, form: str, hold: bool):
    folder = cell(family, form).write(tmp_path)
    tensors = read_headers(folder)
    config = json.loads((folder / "config.json").read_text())
    row = TRANSFORMS_BY_MODULE[f"mlx_lm.models.{family}"]
    plan = make_plan(detect(tensors, config, row.ignored), row, config, hold=hold)
    assert row.moe is not None
    at = f".{row.moe.target}."
    found = [build for build in plan.builds if at in build.target]
    path = found[0].target.partition(at)[0] + at[:-1]
    builds = [
        packed_build(build, [build.held] * len(build.targets) if hold else ())
        for build in found
        if build.target.startswith(f"{path}.")
    ]
    assert len(builds) >= 2
    check(StoredTensors(folder, tensors), builds, path)


def test_few_experts_wait_for_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of many that have to be dequantised, two and what the limit allows are read ahead."""
    build, sources, tensors = a_build("combined", (16, 16), "")
    files = stored(tmp_path, sources, tensors)
    whole = whole_of([packed_build(build)], files, PATH)
    specs = {name: Spec(tuple(a.shape[1:]), a.dtype) for name, a in whole.items()}
    monkeypatch.setattr(source, "_WAITING", 0)
    found = FileSource(files, PATH, [packed_build(build)], specs)
    slots = {n: np.empty(_size(s), np.uint8) for n, s in specs.items()}
    ahead = []

    def into(expert: int) -> dict[str, Any]:
        ahead.append(files.bytes_read)
        return slots

    assert found.read(range(E), into) == {}
    each = files["all"][:1].nbytes + files["all_s"][:1].nbytes
    # When an expert is begun, at most two of those before it are still on their way.
    assert all(read >= (number - 2) * each for number, read in enumerate(ahead[1:], 1))
