"""Under and over another library's wrapper, applied twice and reverted: checkpoint by checkpoint.

The stand-in (``support/shim.py``) misreads or refuses most of these forms by itself, and judges
tensors that nobody loads. With our hooks in place every order loads what ours load alone, bit
for bit, which is right against transformers; without them the stand-in is what it was.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import pytest
import torch
import transformers
from mlx_lm.models import qwen3_5, qwen3_5_moe

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, Cell, Form, build
from parity.verdict import compare, judge
from support import shim
from support.loading import load, new_model, parameters, read, same_bits
from vllm_moe_compat.load.context import current

CLASSES = (qwen3_5.Model, qwen3_5_moe.Model)
STOCK = {cls: vars(cls)["sanitize"] for cls in CLASSES}
E8M0 = Form("E8M0 128", "single", "block", (128, 128), torch.float8_e8m0fnu, grain=1)
EXPERT = "mtp.layers.0.mlp.experts.{}.{}_proj.weight"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    monkeypatch.setattr(logging.getLogger("vllm_moe_compat"), "propagate", True)
    vllm_moe_compat.revert()
    yield
    for cls, original in STOCK.items():
        cls.sanitize = original
    vllm_moe_compat.revert()
    assert all(vars(cls)["sanitize"] is original for cls, original in STOCK.items())


def of_form(form: str | Form, family: str = "qwen3_5_moe") -> Callable[[], Cell]:
    return lambda: build(FAMILIES[family], FORM_BY_NAME[form] if isinstance(form, str) else form)


def with_extras(form: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[], Cell]:
    """The form, with further tensors that no module loads."""

    def made() -> Cell:
        cell = of_form(form)()
        cell.checkpoint.tensors = dict(cell.checkpoint.tensors)
        change(cell.checkpoint.tensors)
        return cell

    return made


def expert_gap(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("gate", "up", "down"):
        for expert in (0, 2):
            weight = EXPERT.format(expert, name)
            tensors[weight] = torch.ones(128, 128).to(torch.float8_e4m3fn)
            tensors[f"{weight}_scale_inv"] = torch.ones(1, 1)


def lonely_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors["mtp.layers.0.self_attn.q_proj.weight_scale_inv"] = torch.ones(1, 1)


def small_blocks(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.visual.blocks.0.attn.qkv.weight"
    tensors[name] = torch.ones(64, 64).to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(2, 2)


def one_projection(tensors: dict[str, torch.Tensor]) -> None:
    for expert in range(4):
        tensors[EXPERT.format(expert, "gate")] = torch.ones(8, 8)


DAILY: dict[str, Callable[[], Cell]] = {
    "MTP experts with a gap": with_extras("block FP8 128", expert_gap),
    "MTP scale without weight": with_extras("block FP8 128", lonely_scale),
    "vision in blocks of 32": with_extras("block FP8 128", small_blocks),
    "MTP experts without up and down": with_extras("per-expert", one_projection),
    "blocks of 32": of_form("block FP8"),
    "E8M0 in blocks of 128": of_form(E8M0),
    "compressed-tensors FP8": of_form("per-channel FP8"),
    "NVFP4": of_form("NVFP4"),
    "dense, E8M0": of_form(E8M0, "qwen3_5"),
}
FULL: dict[str, Callable[[], Cell]] = {
    **{
        form: of_form(form)
        for form in (
            *(
                "saved",
                "release",
                "block FP8 128",
                "per-expert",
                "per-expert w1/w2/w3",
                "MLX form",
                "with MTP",
            ),
            *("block FP8 combined", "block FP8 ragged", "block FP8 E8M0", "block FP8 with MTP"),
            *("per-tensor FP8", "ModelOpt FP8", "int4", "int8 W8A8", "GPTQ", "AWQ", "MXFP4"),
        )
    },
    **{
        f"dense, {form}": of_form(form, "qwen3_5")
        for form in ("release", "block FP8", "block FP8 128", "per-channel FP8", "int4", "NVFP4")
    },
}
CASES = [
    *DAILY,
    *(pytest.param(name, marks=pytest.mark.full) for name in FULL),
]


@pytest.fixture(params=CASES)
def cell(request: pytest.FixtureRequest) -> Cell:
    return (DAILY | FULL)[request.param]()


def outcome(path: Path) -> dict[str, mx.array] | str:
    """Return the parameters, or the words of the refusal."""
    try:
        return parameters(load(path))
    except Exception as error:  # noqa: BLE001 - the stand-in and upstream refuse with anything
        return f"{type(error).__name__}: {error}"


def same(left: dict[str, mx.array] | str, right: dict[str, mx.array] | str) -> bool:
    if isinstance(left, str) or isinstance(right, str):
        return left == right
    return same_bits(left, right)


def test_every_order_loads_what_ours_load_alone(cell: Cell, tmp_path: Path):
    path = cell.write(tmp_path)
    with vllm_moe_compat.applied():
        alone = parameters(load(path))
        found = judge(path, cell.reference, 2e-5)
    assert found.word == "right", found
    remove = shim.install()
    shim_alone = outcome(path)

    vllm_moe_compat.apply()
    assert same(outcome(path), alone), "its shim first, ours over it"
    vllm_moe_compat.apply()
    shim.install()
    assert same(outcome(path), alone), "both applied twice"
    vllm_moe_compat.revert()
    assert same(outcome(path), shim_alone), "reverted over the shim"
    remove()

    vllm_moe_compat.apply()
    remove = shim.install()
    assert same(outcome(path), alone), "ours first, its shim over ours"
    vllm_moe_compat.apply()
    shim.install()
    assert same(outcome(path), alone), "ours first, both applied twice"
    vllm_moe_compat.revert()
    assert same(outcome(path), shim_alone), "reverted under the shim"
    vllm_moe_compat.apply()
    assert same(outcome(path), alone), "applied again"
    remove()
    assert same(outcome(path), alone), "the shim goes, ours stay"


@pytest.fixture
def e8m0(tmp_path: Path) -> Path:
    return of_form(E8M0)().write(tmp_path / "e8m0")


def test_the_stand_in_alone_is_wrong_as_the_real_one_is(e8m0: Path):
    shim.install()
    found = compare(load(e8m0), of_form(E8M0)().reference, 1e-5)
    assert found.word == "wrong", found


def test_each_load_puts_ours_outside_once(e8m0: Path):
    vllm_moe_compat.apply()
    shim.install()
    theirs = qwen3_5_moe.Model.sanitize
    load(e8m0)
    ours = qwen3_5_moe.Model.sanitize
    assert ours is not theirs
    load(e8m0)
    shim.install()
    assert qwen3_5_moe.Model.sanitize is ours
    vllm_moe_compat.revert()
    assert qwen3_5_moe.Model.sanitize is theirs


def test_the_status_says_who_is_over_whom(e8m0: Path):
    def place() -> str:
        rows = {row.module: row for row in vllm_moe_compat.status().rows}
        assert rows[qwen3_5_moe.__name__].state == "patched"
        return rows[qwen3_5_moe.__name__].others

    vllm_moe_compat.apply()
    assert place() == ""
    shim.install()
    assert place() == "wrapped by support.shim, too, over this wrapper until the next load"
    load(e8m0)
    assert place() == "wrapped by support.shim, too, under this wrapper"
    assert place() in str(vllm_moe_compat.status())


def test_loads_in_threads_are_ours_while_a_shim_comes(e8m0: Path, tmp_path: Path):
    """One load is between its hooks when the shim is installed and another load begins."""
    other = of_form("block FP8")().write(tmp_path / "other")
    with vllm_moe_compat.applied():
        wanted = [parameters(load(path)) for path in (e8m0, other)]
        mx.eval(wanted)
    vllm_moe_compat.apply()
    planned, shimmed = threading.Event(), threading.Event()
    found: dict[str, bool] = {}

    def first() -> None:
        with mx.stream(mx.new_stream(mx.default_device())):
            config = mlx_lm.utils.load_config(e8m0)
            planned.set()
            assert shimmed.wait(60)
            weights = new_model(config).sanitize(read(e8m0))
            mx.eval(weights)
            found["first"] = same_bits(weights, wanted[0])

    def second() -> None:
        with mx.stream(mx.new_stream(mx.default_device())):
            assert planned.wait(60)
            shim.install()
            found["second"] = same_bits(parameters(load(other)), wanted[1])
            shimmed.set()

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"first": True, "second": True}


def test_called_directly_under_the_shim_its_own_reading_counts(tmp_path: Path):
    """Without ``load_config`` nobody asks us first: what it reads right stays right."""
    cell = of_form("block FP8 128")()
    path = cell.write(tmp_path)
    vllm_moe_compat.apply()
    shim.install()
    model = new_model(cell.checkpoint.config)
    model.load_weights(list(model.sanitize(read(path)).items()))
    found = compare(model, cell.reference, 2e-2)
    assert found.word == "right", found


def test_a_load_that_fails_leaves_the_order_and_no_plan(e8m0: Path, monkeypatch):
    vllm_moe_compat.apply()
    shim.install()

    def failing(self: Any, config: Any) -> None:
        raise RuntimeError("no module")

    with monkeypatch.context() as patch:
        patch.setattr(qwen3_5_moe.Model, "__init__", failing)
        with pytest.raises(RuntimeError, match="no module"):
            load(e8m0)
    assert judge(e8m0, of_form(E8M0)().reference, 2e-5).word == "right"
    assert current.get() is None


def test_tensors_that_other_code_changes_inside_a_load_are_named(e8m0: Path, caplog):
    """A subclass that a caller picks sees the tensors before the class that we serve."""

    class Own(qwen3_5_moe.Model):
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            return super().sanitize(shim._dequantize(weights))

    vllm_moe_compat.apply()
    picked = {"get_model_classes": lambda config: (Own, qwen3_5_moe.ModelArgs)}
    mlx_lm.utils.load_model(e8m0, **picked)
    (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert str(e8m0) in warning
    assert "mlp.experts.0…3.gate_proj.weight" in warning
    caplog.clear()
    load(e8m0)
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]


PREDICTION_HEADS = [
    *("qwen3_5_moe", "exaone_moe"),
    *(
        pytest.param(name, marks=pytest.mark.full)
        for name, family in FAMILIES.items()
        if family.mtp and name == family.base and name not in ("qwen3_5_moe", "exaone_moe")
    ),
]


@pytest.mark.parametrize("name", PREDICTION_HEADS)
def test_what_nobody_loads_is_gone_before_an_inner_wrapper_looks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With and without ``load_config``, of classes whose ``sanitize`` would drop it, too."""
    family = FAMILIES[name]
    cell = of_form("block FP8 with MTP", name)()
    path = cell.write(tmp_path)
    extras = {tensor for tensor in cell.checkpoint.tensors if tensor.startswith(family.mtp)}
    assert extras
    seen: list[set[str]] = []
    model = importlib.import_module(f"mlx_lm.models.{family.module}").Model
    upstream = model.sanitize

    def judging(self: Any, weights: dict[str, mx.array]) -> Any:
        seen.append(set(weights))
        return upstream(self, weights)

    monkeypatch.setattr(model, "sanitize", judging)
    with vllm_moe_compat.applied():
        assert judge(path, cell.reference, 2e-5).word == "right"
        new_model(mlx_lm.utils.load_config(path)).sanitize(read(path))
    assert len(seen) >= 2
    assert not [names & extras for names in seen if names & extras]
    assert all(seen)
