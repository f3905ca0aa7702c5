"""A further number form is its own file and its executor: nothing else names it.

The form here stores a weight as int8 ``[O, I]`` and a float scale per row under a name of its
own. It is put into the two lists, and then a checkpoint in it is planned, estimated,
inspected, loaded (experts stacked as integers), quantised while loading, guarded and
rewritten, without a word about it anywhere in the package.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import torch

import vllm_moe_compat
from support.checkpoints import FP8_MODULES, Checkpoint, build
from support.loading import load, parameters, read, same_bits
from vllm_moe_compat.checkpoint.findings import Finding
from vllm_moe_compat.checkpoint.headers import TensorInfo, read_headers
from vllm_moe_compat.checkpoint.numbers import FORMS
from vllm_moe_compat.checkpoint.numbers.form import (
    Details,
    FoundNumbers,
    NumberForm,
    StoredWeight,
    WrittenNumbers,
    WrittenWeights,
)
from vllm_moe_compat.checkpoint.operations import Dequantize, Invertible, Op, Operand, Spec
from vllm_moe_compat.commands.inspect.collect import inspect
from vllm_moe_compat.dtypes import mlx_dtype
from vllm_moe_compat.errors import LayoutError
from vllm_moe_compat.execute.numbers import EXECUTORS
from vllm_moe_compat.execute.numbers.executor import Executor
from vllm_moe_compat.execute.stack import Arrays
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.load.report import last_report
from vllm_moe_compat.rewrite.run_rewrite import rewrite
from vllm_moe_compat.rewrite.written_layout import WrittenLayout

ENDING = "_row_scale"


@dataclass(frozen=True, slots=True)
class DequantizeRows(Dequantize, Invertible):
    def result(self, given: Operand, target: str) -> Operand:
        (weight,) = given.weights
        if weight.dtype != "I8" or "row" not in given.parts:
            raise ValueError(f"{given} is not int8 with a scale per row")
        return Operand((Spec(target, weight.shape),))

    def inverse(self) -> QuantizeRows:
        return QuantizeRows()

    @property
    def words(self) -> str:
        return "dequantise int8 with a scale per row"

    def parts_follow(self, weight: Spec, parts: Mapping[str, Spec]) -> bool:
        return False

    def transposed(self) -> DequantizeRows:
        return self

    @property
    def rows_per_part(self) -> int:
        return 1

    @property
    def columns_per_part(self) -> int:
        return 2**30


@dataclass(frozen=True, slots=True)
class QuantizeRows(Invertible):
    def result(self, given: Operand, target: str) -> Operand:
        (weight,) = given.weights
        row = (Spec("F32", weight.shape[:-1]),)
        return Operand((Spec("I8", weight.shape),), {"row": row})

    def inverse(self) -> DequantizeRows:
        return DequantizeRows()

    @property
    def words(self) -> str:
        return "quantise to int8"


@dataclass
class Found(FoundNumbers):
    form: NumberForm
    tensors: Mapping[str, TensorInfo]
    weights: dict[str, StoredWeight] = field(default_factory=dict)
    bare: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.weights or self.bare)

    def logical(self, weight: str) -> TensorInfo:
        return self.tensors[weight]

    def dequantize(self, weight: str) -> DequantizeRows:
        return DequantizeRows()

    def findings(self) -> Iterator[Finding]:
        for name in self.bare:
            yield Finding(name, "is int8 without a scale", f"{name}{ENDING}", topic="rows")

    def kinds(self) -> Collection[frozenset[str]]:
        return [frozenset({"rows"})]

    def stray(self) -> Collection[str]:
        return self.bare

    @property
    def details(self) -> Details:
        return Details("int8 rows", len(self.weights))


class Rows(NumberForm):
    name = "rows"
    title = "int8"
    faults: Mapping[str, str] = {}
    methods = frozenset({"rows"})
    dtypes = frozenset({"I8"})

    def find(self, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Found:
        found = Found(self, tensors)
        for name, info in tensors.items():
            if info.dtype == "I8":
                scale = f"{name}{ENDING}"
                if scale in tensors:
                    found.weights[name] = StoredWeight(name, (("row", scale),))
                else:
                    found.bare.append(name)
        return found

    def infer(self, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        return dict(tensors)


class RowsExecutor(Executor):
    def ready(self, op: Any, parts: Mapping[str, mx.array], shape: Any) -> dict[str, mx.array]:
        return {"row": parts["row"].reshape(shape[0], shape[1], 1).astype(mx.float32)}

    def floats(self, op: Any, weight: Any, parts: Any, experts: Any, rows: Any, dtype: str) -> Any:
        return (weight.astype(mx.float32) * parts["row"][experts, rows]).astype(mlx_dtype(dtype))

    def restrict(self, op: Any, parts: Any, shape: Any, region: Any) -> dict[str, mx.array]:
        raise NotImplementedError("no test restricts it")

    def quantize(self, op: Op, given: Arrays) -> Arrays:
        weight = given.weights[0].astype(mx.float32)
        row = mx.abs(weight).max(axis=-1) / 127
        packed = mx.round(weight / row[..., None]).astype(mx.int8)
        return Arrays([packed], {"row": [row]})


@dataclass(frozen=True)
class WrittenRows(WrittenNumbers):
    def write(self, shape: tuple[int, ...], *weights: str) -> WrittenWeights:
        names = tuple(f"{weight}{ENDING}" for weight in weights)
        return WrittenWeights((("row", names),), (DequantizeRows(),))

    def quantization_config(self, kept: Collection[str]) -> dict[str, Any]:
        return {"quant_method": "rows", "ignore": sorted(kept)}

    @property
    def words(self) -> str:
        return "int8 rows"


@pytest.fixture(autouse=True)
def _added(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("vllm_moe_compat.checkpoint.numbers.FORMS", [*FORMS, Rows()])
    for op in (DequantizeRows, QuantizeRows):
        monkeypatch.setitem(EXECUTORS, op, RowsExecutor())
    with vllm_moe_compat.applied():
        yield


def stored(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim > 1 and (name.endswith(FP8_MODULES) or ".experts." in name)


def in_rows(layout: str) -> tuple[Checkpoint, Checkpoint]:
    """A checkpoint in the form, and one with the same values as floats."""
    floats = build(layout, mtp=True, dtype=torch.float32)
    rows = Checkpoint({}, floats.config | {"quantization_config": {"quant_method": "rows"}})
    for name, tensor in list(floats.tensors.items()):
        if name.startswith("mtp.") or not stored(name, tensor):
            rows.tensors[name] = tensor
            continue
        scale = tensor.abs().amax(dim=-1) / 127
        rows.tensors[name] = (tensor / scale[..., None]).round().to(torch.int8)
        rows.tensors[f"{name}{ENDING}"] = scale
        floats.tensors[name] = rows.tensors[name].float() * scale[..., None]
    return rows, floats


@pytest.mark.parametrize("layout", ["per-expert", "combined"])
def test_a_checkpoint_in_it_loads_as_its_values(layout: str, tmp_path: Path):
    rows, floats = in_rows(layout)
    found = parameters(load(rows.write(tmp_path / "rows")))
    report = last_report()
    assert same_bits(found, parameters(load(floats.write(tmp_path / "floats"))))
    assert report is not None
    assert "int8 rows" in report.words
    assert report.dequantized == sum(name.endswith(ENDING) for name in rows.tensors)


def test_it_is_quantised_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows, floats = in_rows("per-expert")
    monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", "mxfp8")
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    found = parameters(load(rows.write(tmp_path / "rows")))
    assert same_bits(found, parameters(load(floats.write(tmp_path / "floats"))))


def test_inspect_speaks_of_it(tmp_path: Path):
    rows, _ = in_rows("per-expert")
    report = inspect(str(rows.write(tmp_path)))
    assert (report.verdict, report.exit_code) == ("loads", 0)
    assert report.quantization is not None
    assert (report.quantization.form, report.quantization.method) == ("int8 rows", "rows")
    assert report.ours is not None
    assert any("dequantise int8 with a scale per row" in s.action for s in report.ours.steps)
    assert report.memory is not None
    assert report.memory.needs[0].weights > report.files.tensor_bytes  # type: ignore[union-attr]


def test_a_fault_of_it_is_named_by_inspect_and_by_the_load(tmp_path: Path):
    rows, _ = in_rows("per-expert")
    name = next(name for name in rows.tensors if name.endswith(f"q_proj.weight{ENDING}"))
    del rows.tensors[name]
    rows.write(tmp_path)
    (finding,) = [f for f in inspect(str(tmp_path)).findings if f.severity == "error"]
    assert finding.id == "rows-scales"
    assert "is int8 without a scale" in finding.message
    with pytest.raises(LayoutError, match="is int8 without a scale"):
        load(tmp_path)


def test_it_is_written_and_read_back(tmp_path: Path):
    _, floats = in_rows("combined")
    path = floats.write(tmp_path)
    row = TRANSFORMS_BY_MODULE["mlx_lm.models.qwen3_5_moe"]
    wanted = WrittenLayout(numbers=WrittenRows())
    written = dict(rewrite(read(path), row, floats.config, wanted, tensors=read_headers(path)))
    experts = [n for n in written if ".experts." in n and n.endswith(".weight")]
    assert experts
    assert all(written[n].dtype == mx.int8 and f"{n}{ENDING}" in written for n in experts)
    floated = dict(rewrite(dict(written), row, floats.config, WrittenLayout(), dtype="float32"))
    wanted_values = dict(rewrite(read(path), row, floats.config, WrittenLayout(), dtype="float32"))
    assert all(mx.allclose(floated[n], wanted_values[n], atol=1e-6).item() for n in experts)
