"""Putting the hooks in, taking them out, and saying what is the case."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import types
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import pytest
from mlx_lm.models import qwen3_5, qwen3_5_moe

import vllm_moe_compat
from support.checkpoints import Fp8, build
from support.loading import load, new_model, parameters, read, same_bits
from vllm_moe_compat.errors import LayoutError, UnsupportedCheckpointError
from vllm_moe_compat.families import registry
from vllm_moe_compat.load import patching
from vllm_moe_compat.load.context import current
from vllm_moe_compat.load.report import last_report

STOCK = {
    (mlx_lm.utils, "load_config"): mlx_lm.utils.load_config,
    (qwen3_5.Model, "sanitize"): qwen3_5.Model.sanitize,
    (qwen3_5_moe.Model, "sanitize"): qwen3_5_moe.Model.sanitize,
}


@pytest.fixture(autouse=True)
def _clean():
    vllm_moe_compat.revert()
    with pytest.MonkeyPatch.context() as patch:
        # A test that ran before may have lent the logger vLLM's handlers.
        patch.setattr(logging.getLogger("vllm_moe_compat"), "propagate", True)
        yield
    vllm_moe_compat.revert()
    assert stock_is_back()


def stock_is_back() -> bool:
    return all(vars(owner)[name] is original for (owner, name), original in STOCK.items())


def states() -> dict[str, str]:
    """Return the states of the two modules that are imported here, and of qwen3."""
    found = {r.module.rpartition(".")[2]: r.state for r in vllm_moe_compat.status().rows}
    return {name: found[name] for name in ("qwen3_5", "qwen3_5_moe")}


def test_apply_twice_wraps_once():
    vllm_moe_compat.apply()
    once = qwen3_5_moe.Model.sanitize
    vllm_moe_compat.apply()
    assert qwen3_5_moe.Model.sanitize is once
    vllm_moe_compat.revert()
    assert stock_is_back()


def test_exactly_the_hooks_that_are_named_are_installed():
    vllm_moe_compat.apply()
    changed = {key for key, original in STOCK.items() if vars(key[0])[key[1]] is not original}
    assert changed == set(STOCK)
    imported = {f"{m}.Model.sanitize" for m in registry.TRANSFORMS_BY_MODULE if m in sys.modules}
    assert {hook.name for hook in vllm_moe_compat.status().hooks} == {
        "mlx_lm.utils.load_config",
        *imported,
    }


def test_apply_after_revert_works(tmp_path: Path):
    path = build(fp8=Fp8()).write(tmp_path)
    for _ in range(2):
        vllm_moe_compat.apply()
        load(path)
        vllm_moe_compat.revert()
        with pytest.raises(ValueError, match="not in model"):
            load(path)


def test_applied_undoes_itself_when_the_body_raises():
    def fail_inside() -> None:
        with vllm_moe_compat.applied():
            assert not stock_is_back()
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert stock_is_back()


def test_applied_inside_apply_leaves_it_applied():
    vllm_moe_compat.apply()
    with vllm_moe_compat.applied():
        pass
    assert states() == {"qwen3_5": "patched", "qwen3_5_moe": "patched"}
    with vllm_moe_compat.applied():
        vllm_moe_compat.revert()
    assert states() == {"qwen3_5": "patched", "qwen3_5_moe": "patched"}


def test_a_failure_on_the_way_leaves_nothing_installed(monkeypatch):
    real = patching._PATCHES.install

    def failing(owner, name, hook):
        if owner is qwen3_5_moe.Model:
            raise RuntimeError("half-way")
        real(owner, name, hook)

    monkeypatch.setattr(patching._PATCHES, "install", failing)
    with pytest.raises(RuntimeError, match="half-way"):
        vllm_moe_compat.apply()
    assert stock_is_back()
    assert states() != {"qwen3_5": "patched", "qwen3_5_moe": "patched"}
    monkeypatch.setattr(patching._PATCHES, "install", real)
    vllm_moe_compat.apply()
    assert states() == {"qwen3_5": "patched", "qwen3_5_moe": "patched"}


def test_switched_off_by_the_environment_nothing_is_patched(monkeypatch):
    monkeypatch.setenv("VLLM_MOE_COMPAT", "0")
    vllm_moe_compat.apply()
    assert stock_is_back()
    assert set(states().values()) == {"off"}


def test_status_is_readable():
    vllm_moe_compat.apply()
    text = str(vllm_moe_compat.status())
    assert "mlx_lm.models.qwen3_5_moe: patched" in text
    assert "mlx-lm " in text


def test_models_imported_later_are_wrapped_and_none_is_imported_to_look():
    code = """
import sys, vllm_moe_compat as c
assert {r.state for r in c.status().rows} == {"not applied"}
c.apply()
assert {r.state for r in c.status().rows} == {"waiting"}, c.status()
assert not any(m.partition(".")[0] in ("mlx", "mlx_lm", "vllm", "torch") for m in sys.modules)
import mlx_lm.utils
assert [h.name for h in c.status().hooks] == ["mlx_lm.utils.load_config"]
import mlx_lm.models.qwen3_5_moe as m
moe = "mlx_lm.models.qwen3_5_moe"
assert [r.state for r in c.status().rows if r.module == moe] == ["patched"], c.status()
assert {r.state for r in c.status().rows} == {"patched", "waiting"}, c.status()
c.revert()
assert m.Model.sanitize.__module__ == "mlx_lm.models.qwen3_5_moe"
assert not hasattr(m.Model.sanitize, "__wrapped__")
assert {r.state for r in c.status().rows} == {"reverted"}
c.apply()
assert m.Model.sanitize.__wrapped__
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_models_imported_after_a_revert_stay_stock():
    code = """
import vllm_moe_compat as c
c.apply(); c.revert()
import mlx_lm.utils, mlx_lm.models.qwen3_5_moe as m
assert not hasattr(m.Model.sanitize, "__wrapped__")
assert not hasattr(mlx_lm.utils.load_config, "__wrapped__")
c.apply()
assert hasattr(m.Model.sanitize, "__wrapped__")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# The variant that is loaded and cannot be patched


QWEN3 = "mlx_lm.models.qwen3"


@pytest.fixture
def _unmapped(monkeypatch) -> None:
    """Take qwen3's row away."""
    rows = {k: v for k, v in registry.TRANSFORMS_BY_MODULE.items() if k != QWEN3}
    monkeypatch.setattr(registry, "TRANSFORMS_BY_MODULE", rows)


def broken_load(path: Path) -> None:
    """Load what cannot be patched and has FP8."""
    with pytest.raises(UnsupportedCheckpointError, match="it cannot be patched, since"):
        load(path)


def test_a_class_without_sanitize_gets_one_and_loses_it_again(tmp_path: Path, monkeypatch):
    import mlx_lm.models.qwen3 as module

    monkeypatch.delattr(module.Model, "sanitize")
    vllm_moe_compat.apply()
    load(fp8_qwen3(tmp_path))
    vllm_moe_compat.revert()
    assert not hasattr(module.Model, "sanitize")


@pytest.mark.parametrize("inherited", [False, True])
def test_a_call_by_keyword_is_passed_on_after_a_revert(inherited: bool, monkeypatch):
    import mlx_lm.models.qwen3 as module

    if inherited:
        base = type("Base", (module.nn.Module,), {"sanitize": lambda self, weights: {"base": 1}})
        monkeypatch.setattr(module, "Model", type("Model", (base,), {}))
    else:
        monkeypatch.setattr(module, "Model", type("Model", (module.nn.Module,), {}))
    vllm_moe_compat.apply()
    sanitize = module.Model().sanitize
    vllm_moe_compat.revert()
    assert sanitize(weights={"own": 2}) == ({"base": 1} if inherited else {"own": 2})


def test_a_class_whose_sanitize_is_no_function_is_named_at_each_load(
    tmp_path: Path, monkeypatch, caplog
):
    import mlx_lm.models.qwen3 as module

    monkeypatch.setattr(module.Model, "sanitize", "none")
    vllm_moe_compat.apply()
    (found,) = (r for r in vllm_moe_compat.status().rows if r.module == QWEN3)
    assert found.state == "unpatchable"
    assert "sanitize" in str(vllm_moe_compat.status())
    path = fp8_qwen3(tmp_path)
    for _ in range(2):
        caplog.clear()
        broken_load(path)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert module.__name__ in record.message
        assert "1 FP8 weights" in record.message


@pytest.mark.usefixtures("_unmapped")
def test_a_module_without_a_row_is_named_at_each_load(tmp_path: Path, caplog):
    vllm_moe_compat.apply()
    path = fp8_qwen3(tmp_path)
    for _ in range(2):
        caplog.clear()
        broken_load(path)
        assert [r.levelno for r in caplog.records] == [logging.WARNING]
        assert "mlx_lm.models.qwen3 " in caplog.text


@pytest.mark.usefixtures("_unmapped")
def test_a_model_without_a_row_that_needs_nothing_is_not_mentioned(tmp_path: Path, caplog):
    vllm_moe_compat.apply()
    load(qwen3(tmp_path))
    assert not caplog.records


@pytest.mark.usefixtures("_unmapped")
def test_a_model_without_a_row_is_not_ours_to_refuse(tmp_path: Path):
    vllm_moe_compat.apply()
    path = qwen3(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"moe_num_experts": [64, 64]}))
    (path / "model-copy.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    load(path)
    (path / "model-copy.safetensors").write_bytes(b"")
    with pytest.raises(RuntimeError, match="Unable to read"):
        load(path)


@pytest.mark.usefixtures("_unmapped")
@pytest.mark.needs("mlx_lm/utils.py", "_tokenizer_defaults")
def test_one_load_of_model_and_tokenizer_warns_once_and_leaves_no_context(
    tmp_path: Path, monkeypatch, caplog
):
    vllm_moe_compat.apply()
    path = fp8_qwen3(tmp_path)
    monkeypatch.setattr(mlx_lm.utils, "load_model", lambda p, *a, **k: mlx_lm.utils.load_config(p))
    with pytest.raises(UnsupportedCheckpointError):
        mlx_lm.utils.load_model(path)
    mlx_lm.utils._tokenizer_defaults(path)
    assert len(caplog.records) == 1
    sound = build(fp8=Fp8()).write(tmp_path / "sound")
    mlx_lm.utils._tokenizer_defaults(sound)
    assert current.get() is None
    mlx_lm.utils.load_config(sound)
    assert current.get() is not None


@pytest.mark.needs("mlx_lm/utils.py", "trust_remote_code: bool = False")
def test_the_checkpoints_own_code_is_left_alone(tmp_path: Path, caplog):
    checkpoint = build(fp8=Fp8())
    checkpoint.config["model_file"] = "custom.py"
    vllm_moe_compat.apply()
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(checkpoint.write(tmp_path))
    assert "custom.py" in caplog.text


def test_an_unknown_model_type_is_mlx_lms_to_refuse(tmp_path: Path):
    checkpoint = build(fp8=Fp8())
    checkpoint.config["model_type"] = "nobody_knows"
    vllm_moe_compat.apply()
    with pytest.raises(ValueError, match="nobody_knows not supported"):
        load(checkpoint.write(tmp_path))


def qwen3(path: Path) -> Path:
    from mlx.utils import tree_flatten

    config = {
        "model_type": "qwen3",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "vocab_size": 32,
        "max_position_embeddings": 64,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
    }
    (path / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(new_model(config).parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    return path


def fp8_qwen3(path: Path) -> Path:
    import torch
    from safetensors.torch import load_file, save_file

    file = qwen3(path) / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    weights[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(weights, file)
    return path


# How a load behaves


def test_the_original_error_of_sanitize_comes_through_and_the_context_is_gone(
    tmp_path: Path, monkeypatch
):
    def failing(self, weights):
        raise RuntimeError("upstream")

    monkeypatch.setattr(qwen3_5_moe.Model, "sanitize", failing)
    vllm_moe_compat.apply()
    path = build(fp8=Fp8()).write(tmp_path)
    with pytest.raises(RuntimeError, match="upstream"):
        load(path)
    assert current.get() is None
    vllm_moe_compat.revert()


def test_nested_mapped_models_are_served_once(tmp_path: Path, monkeypatch, caplog):
    class Outer(qwen3_5_moe.Model):
        def sanitize(self, weights):
            return super().sanitize(weights)

    module = types.ModuleType("outer_model")
    Outer.__name__, Outer.__module__, module.Model = "Model", "outer_model", Outer
    monkeypatch.setitem(sys.modules, "outer_model", module)
    base = registry.TRANSFORMS_BY_MODULE["mlx_lm.models.qwen3_5_moe"]
    rows = {
        **registry.TRANSFORMS_BY_MODULE,
        "outer_model": replace(base, module="outer_model"),
    }
    monkeypatch.setattr(registry, "TRANSFORMS_BY_MODULE", rows)
    checkpoint = build(fp8=Fp8())
    checkpoint.write(tmp_path)
    with vllm_moe_compat.applied(), caplog.at_level(logging.INFO, "vllm_moe_compat"):
        model = Outer(qwen3_5_moe.ModelArgs.from_dict(checkpoint.config))
        model.load_weights(list(model.sanitize(read(tmp_path)).items()), strict=True)
    assert len(caplog.records) == 1
    assert "outer_model" in caplog.text


def test_a_class_that_inherits_sanitize_is_covered_by_its_parents_row(tmp_path: Path):
    class Heir(qwen3_5_moe.Model):
        pass

    checkpoint = build(fp8=Fp8())
    checkpoint.write(tmp_path)
    assert registry.row_for(Heir) is registry.row_for(qwen3_5_moe.Model)
    with vllm_moe_compat.applied():
        model = Heir(qwen3_5_moe.ModelArgs.from_dict(checkpoint.config))
        model.load_weights(list(model.sanitize(read(tmp_path)).items()), strict=True)


def test_a_row_for_a_class_that_inherits_sanitize_comes_out_without_a_trace(monkeypatch):
    class Heir(qwen3_5.Model):
        pass

    module = types.ModuleType("heir_model")
    Heir.__name__, Heir.__module__, module.Model = "Model", "heir_model", Heir
    monkeypatch.setitem(sys.modules, "heir_model", module)
    heir = replace(registry.TRANSFORMS_BY_MODULE["mlx_lm.models.qwen3_5"], module="heir_model")
    rows = {**registry.TRANSFORMS_BY_MODULE, heir.module: heir}
    monkeypatch.setattr(registry, "TRANSFORMS_BY_MODULE", rows)
    with vllm_moe_compat.applied():
        assert "sanitize" in vars(Heir)
        model = Heir(qwen3_5.ModelArgs.from_dict(build(dense=True).config))
        assert model.sanitize({"model.norm.weight": mx.ones(4)})
    assert "sanitize" not in vars(Heir)


def test_loads_in_threads_do_not_mix(tmp_path: Path):
    paths = {
        "128": build(fp8=Fp8(), seed=1).write(tmp_path / "a"),
        "64": build(fp8=Fp8((64, 32)), seed=2).write(tmp_path / "b"),
    }
    vllm_moe_compat.apply()
    wanted = {name: parameters(load(path)) for name, path in paths.items()}
    mx.eval(wanted)
    found: dict[str, bool] = {}
    barrier = threading.Barrier(2)

    def run(name: str) -> None:
        with mx.stream(mx.new_stream(mx.default_device())):
            config = mlx_lm.utils.load_config(paths[name])
            barrier.wait()
            weights = new_model(config).sanitize(read(paths[name]))
            mx.eval(weights)
            found[name] = same_bits(weights, wanted[name])

    threads = [threading.Thread(target=run, args=(name,)) for name in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"128": True, "64": True}


def test_the_whole_of_mlx_lm_load_works(tmp_path: Path, demo_checkpoint):
    with vllm_moe_compat.applied():
        model, tokenizer = mlx_lm.load(str(demo_checkpoint.path))
        text = mlx_lm.generate(model, tokenizer, "Beautiful", max_tokens=8)
    assert text
    report = last_report()
    assert report is not None
    assert report.path == str(demo_checkpoint.path)


def test_a_refused_load_can_be_told_from_mlx_lms_own_errors(tmp_path: Path):
    checkpoint = build(fp8=Fp8())
    for name in [n for n in checkpoint.tensors if ".experts.1." in n]:
        del checkpoint.tensors[name]
    checkpoint.write(tmp_path)
    with vllm_moe_compat.applied(), pytest.raises(ValueError, match="non-contiguous") as caught:
        mlx_lm.load(str(tmp_path))
    assert isinstance(caught.value, LayoutError)
