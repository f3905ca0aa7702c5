"""Decoding of vLLM's ``SchedulerOutput`` into a ``Schedule``.

vLLM encodes a step as a difference to the step before: new requests in full, running ones as
appended block ids, finished ones by id, preempted ones by their absence. No other file knows the
encoding.

vLLM has two encodings. The one decoded here is V1, which its scheduler emits unless the V2 model
runner is selected. V2 is refused by name; a decoder for it would begin in ``decode``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_moe_compat.backend.step.schedule import NewRequest, RunningRequest, Schedule
from vllm_moe_compat.backend.vllm import bridge
from vllm_moe_compat.errors import UnsupportedServingError

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


def read_schedule(output: SchedulerOutput) -> Schedule:
    """Translate one scheduler output.

    Raises:
        UnsupportedServingError: it is in the V2 encoding, or contains encoder inputs.
    """
    if output.scheduled_encoder_inputs:
        raise UnsupportedServingError("The embedded MLX backend takes text, no images or audio.")
    if bridge.uses_v2_encoding(output):
        raise UnsupportedServingError(
            "vLLM's scheduler uses the encoding of its V2 model runner (new requests have "
            "prefill_token_ids), and the embedded MLX backend reads the V1 encoding; set "
            "VLLM_USE_V2_MODEL_RUNNER=0."
        )
    return _decode_v1(output)


def _decode_v1(output: SchedulerOutput) -> Schedule:
    new = []
    for request in output.scheduled_new_reqs:
        if request.prompt_token_ids is None or request.sampling_params is None:
            raise UnsupportedServingError(
                f"Request {request.req_id} has no prompt tokens or no sampling parameters; "
                "the embedded MLX backend serves text generation from tokens only."
            )
        new.append(
            NewRequest(
                request.req_id,
                list(request.prompt_token_ids),
                request.sampling_params,
                request.block_ids,
                request.num_computed_tokens,
            )
        )
    cached = output.scheduled_cached_reqs
    running = tuple(
        RunningRequest(
            req_id,
            cached.num_computed_tokens[i],
            cached.num_output_tokens[i],
            cached.new_block_ids[i],
            req_id in cached.resumed_req_ids,
        )
        for i, req_id in enumerate(cached.req_ids)
    )
    drafts = output.scheduled_spec_decode_tokens
    return Schedule(
        frozenset(output.finished_req_ids),
        tuple(new),
        running,
        # vLLM counts drafts as scheduled tokens.
        {
            req_id: count - len(drafts.get(req_id, ()))
            for req_id, count in output.num_scheduled_tokens.items()
        },
        bridge.page_copies(output),
        drafts,
    )
