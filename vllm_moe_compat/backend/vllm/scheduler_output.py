"""vLLM's step encoding, decoded. The only file that knows it.

In: ``vllm.v1.core.sched.output.SchedulerOutput``, which is a difference to the
last step: new requests whole, running ones as appended block ids, finished ones
by id, preempted ones by their absence. Out: ``Step``, the same in our terms, so
that a change of the encoding changes this file alone.

vLLM has two encodings. This one is called V1, and is what its scheduler emits
unless the V2 model runner is on. V2 differs in how a preempted request comes
back: as a new one, with all of its tokens in ``prefill_token_ids``, where V1 has
a running one in ``resumed_req_ids``. ``_is_v2`` tells them apart, and ``decode``
is where a second reading would begin; until there is one, V2 is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_moe_compat.errors import UnsupportedServingError

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request that the worker has not seen, or sees again under the same id."""

    req_id: str
    prompt: list[int]
    params: Any  # vllm.SamplingParams
    blocks: tuple[list[int], ...]  # one list per KV group
    computed: int  # tokens whose KV is there already: a prefix-cache hit


@dataclass(frozen=True, slots=True)
class RunningRequest:
    """A request that the worker knows."""

    req_id: str
    computed: int
    num_output: int  # tokens the scheduler counts as generated; later ones are void
    blocks: tuple[list[int], ...] | None
    resumed: bool  # after a preemption: ``blocks`` replace the old ones


@dataclass(frozen=True, slots=True)
class Step:
    """One step: who ended, who is computed and how far, which pages are copied."""

    finished: frozenset[str]
    new: tuple[NewRequest, ...]
    running: tuple[RunningRequest, ...]
    scheduled: dict[str, int]  # request id → number of tokens in this step
    page_copies: tuple[tuple[int, int], ...]  # (source block, destination block)

    def given_blocks(self) -> set[int]:
        """Every block that this step gives to some request."""
        tables = [request.blocks for request in self.new]
        tables += [request.blocks for request in self.running if request.blocks is not None]
        return {block for table in tables for group in table for block in group}


def decode(output: SchedulerOutput) -> Step:
    """Translate one scheduler output.

    Raises:
        UnsupportedServingError: it is in the V2 encoding, or asks for speculative
            tokens or encoder inputs.
    """
    if output.scheduled_spec_decode_tokens:
        raise UnsupportedServingError("The embedded MLX backend has no speculative decoding.")
    if output.scheduled_encoder_inputs:
        raise UnsupportedServingError("The embedded MLX backend takes text, no images or audio.")
    if _is_v2(output):
        raise UnsupportedServingError(
            "vLLM's scheduler speaks to its V2 model runner (new requests have prefill_token_ids), "
            "and the embedded MLX backend reads the V1 encoding; set VLLM_USE_V2_MODEL_RUNNER=0."
        )
    return _decode_v1(output)


def _is_v2(output: SchedulerOutput) -> bool:
    """Whether some new request is in the V2 encoding."""
    return any(
        getattr(request, "prefill_token_ids", None) is not None
        for request in output.scheduled_new_reqs
    )


def _decode_v1(output: SchedulerOutput) -> Step:
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
    copies = getattr(output, "kv_cache_block_copies", None) or ()
    return Step(
        frozenset(output.finished_req_ids),
        tuple(new),
        running,
        dict(output.num_scheduled_tokens),
        tuple((int(source), int(destination)) for source, destination in copies),
    )
