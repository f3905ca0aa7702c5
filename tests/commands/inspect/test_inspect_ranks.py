"""``inspect --ranks N``: what each rank would hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support import models
from vllm_moe_compat import demo
from vllm_moe_compat.commands.inspect.collect import inspect
from vllm_moe_compat.commands.inspect.ranks import WITHOUT_STAGES, partition
from vllm_moe_compat.commands.main import main


@pytest.mark.parametrize(("layers", "ranks"), [(4, 2), (5, 2), (7, 4), (61, 8), (3, 3), (94, 5)])
def test_layers_are_divided_as_vllm_divides_them(layers: int, ranks: int) -> None:
    from vllm.distributed.utils import get_pp_indices

    ends = [get_pp_indices(layers, rank, ranks) for rank in range(ranks)]
    assert partition(layers, ranks) == [end - begin for begin, end in ends]


def test_shares_are_those_that_ranks_hold(demo_checkpoint: demo.DemoCheckpoint) -> None:
    whole = inspect(str(demo_checkpoint.path))
    assert whole.ranks is None
    assert whole.memory is not None
    weights = whole.memory.needs[0].weights
    found = inspect(str(demo_checkpoint.path), 2).ranks
    assert found is not None
    assert found.divided + found.whole == pytest.approx(weights, abs=4)
    assert found.weights == pytest.approx(found.whole + found.divided / 2, abs=1000)
    assert [(stage.first, stage.last) for stage in found.stages] == [(0, 1), (2, 3)]
    # Embedding and head are on both ranks.
    assert weights < sum(stage.weights for stage in found.stages) < 1.3 * weights
    assert not found.tensor_refused
    assert not found.pipeline_refused


def test_what_the_config_rules_out_is_said(demo_checkpoint: demo.DemoCheckpoint) -> None:
    found = inspect(str(demo_checkpoint.path), 5).ranks
    assert found is not None
    assert any("num_attention_heads is" in reason for reason in found.tensor_refused)
    assert "5 ranks need at least as many layers" in found.pipeline_refused
    assert found.stages == []


def test_experts_on_disk_rule_ranks_out(
    demo_checkpoint: demo.DemoCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(demo_checkpoint.path)
    monkeypatch.setenv("VLLM_MOE_COMPAT_EXPERT_CACHE", "50%")
    found = inspect(path, 2).ranks
    assert found is not None
    assert found.tensor_refused == [found.pipeline_refused]
    assert "VLLM_MOE_COMPAT_EXPERT_CACHE=50% on several ranks" in found.pipeline_refused
    monkeypatch.setenv("VLLM_MOE_COMPAT_EXPERT_CACHE", "OFF")
    found = inspect(path, 2).ranks
    assert found is not None
    assert not found.tensor_refused
    assert not found.pipeline_refused


@pytest.mark.parametrize("kind", ["gemma4_text", "nemotron_h"])
def test_families_without_stages_are_named(kind: str, tmp_path: Path) -> None:
    found = inspect(str(models.write_mlx(tmp_path / "model", kind)), 2).ranks
    assert found is not None
    assert kind in WITHOUT_STAGES
    assert "hand on more than one array" in found.pipeline_refused


def test_the_command(
    demo_checkpoint: demo.DemoCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(demo_checkpoint.path)
    assert main(["inspect", path, "--ranks", "2"]) == 0
    text = capsys.readouterr().out
    assert "--tensor-parallel-size 2" in text
    assert text.count("--pipeline-parallel-size 2") == 2
    assert main(["inspect", path, "--ranks", "2", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"]["count"] == 2
    with pytest.raises(SystemExit):
        main(["inspect", path, "--ranks", "0"])
