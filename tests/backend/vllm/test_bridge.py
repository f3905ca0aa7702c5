"""Differences between vLLM releases; the rest of the suite runs on each of them."""

from __future__ import annotations

import importlib.metadata
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

from vllm_moe_compat.backend.vllm import bridge, bridge_kv
from vllm_moe_compat.backend.vllm.scheduler_output import read_schedule
from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.versions import TESTED


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    logger = logging.getLogger("vllm_moe_compat")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "parent", logging.getLogger())
    bridge.warn_outside_tested_range.cache_clear()
    yield caplog
    bridge.warn_outside_tested_range.cache_clear()


def test_a_tested_vllm_is_not_warned_of(warnings: pytest.LogCaptureFixture) -> None:
    bridge.warn_outside_tested_range()
    assert not warnings.records


@pytest.mark.parametrize("version", ["0.27.0", "0.33.0", "0.33.0rc1", "1.0.dev3+gabc"])
def test_another_is_warned_of_once(
    version: str, warnings: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    for _ in range(3):
        bridge.warn_outside_tested_range()
    (record,) = warnings.records
    assert record.levelname == "WARNING"
    assert version in record.getMessage()
    assert TESTED["vllm"] in record.getMessage()


def new_request(**more: Any) -> NewRequestData:
    return NewRequestData(
        req_id="a",
        prompt_token_ids=[1, 2, 3],
        mm_features=[],
        sampling_params=SamplingParams(),
        pooling_params=None,
        block_ids=([1],),
        num_computed_tokens=0,
        lora_request=None,
        **more,
    )


def test_the_v1_encoding_is_read_and_v2_refused_by_name() -> None:
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = [new_request()]
    (request,) = read_schedule(output).new
    assert (request.prompt, request.blocks) == ([1, 2, 3], ([1],))
    output.scheduled_new_reqs = [new_request(prefill_token_ids=[1, 2, 3])]
    with pytest.raises(UnsupportedServingError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        read_schedule(output)


def test_a_cache_plan_of_a_third_kind_is_refused() -> None:
    config = SimpleNamespace(kv_cache_tensors=[SimpleNamespace(size=1)])
    with pytest.raises(UnsupportedServingError, match="neither layer_stride nor shared_by"):
        bridge_kv.layers_by_region(config)  # type: ignore[arg-type]


def test_vllms_input_batch_takes_our_blocks() -> None:
    import torch
    from vllm.v1.worker.gpu_input_batch import InputBatch

    batch = InputBatch(
        max_num_reqs=2,
        max_model_len=32,
        max_num_batched_tokens=32,
        device=torch.device("cpu"),
        vocab_size=8,
        **bridge.input_batch_blocks([16]),
    )
    assert len(batch.block_table.block_tables) == 1


def test_settings_that_a_release_does_not_have_count_as_unset() -> None:
    bare: Any = SimpleNamespace()
    assert bridge.watermark_config(bare) is None
    assert bridge.reasoning_config(bare) is None
    assert bridge.cpu_offload_gb(bare) == 0
    assert not bridge.returns_routed_experts(bare)
    assert bridge.input_kind(object()) is None


def test_settings_that_a_release_has_are_read() -> None:
    offload = SimpleNamespace(uva=SimpleNamespace(cpu_offload_gb=1.5))
    full: Any = SimpleNamespace(
        watermark_config="w", offload_config=offload, enable_return_routed_experts=True
    )
    assert bridge.watermark_config(full) == "w"
    assert bridge.cpu_offload_gb(full) == 1.5
    assert bridge.returns_routed_experts(full)
    assert bridge.input_kind({"type": "embeds"}) == "embeds"


def test_copies_of_pages_are_read_where_the_release_has_them() -> None:
    output = SchedulerOutput.make_empty()
    assert bridge.page_copies(output) == ()
    output.kv_cache_block_copies = [(1, 2)]
    assert read_schedule(output).page_copies == ((1, 2),)


def test_a_group_of_layers_of_several_shapes_has_a_spec_for_each() -> None:
    group: Any = SimpleNamespace(kv_cache_specs={"layers.1": "own"})
    assert bridge_kv.layer_spec(group, "layers.1") == "own"
    assert bridge_kv.layer_spec(group, "layers.0") is group


def test_host_logits_are_sampled_beside_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from vllm.v1.sample.ops import topk_topp_sampler as sampler

    monkeypatch.setattr(sampler, "HAS_TRITON", True)  # As vLLM finds beside a GPU.
    bridge.sample_without_triton()
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    kept = sampler.apply_top_k_top_p(logits, torch.tensor([2]), None)
    assert kept.isfinite().tolist() == [[False, True, False, True]]
