"""States between two steps: which are written to pages, and which are discarded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.step.batch import Batch, Request
from vllm_moe_compat.backend.step.schedule import Schedule


def drop_preempted(storage: LayerStorage, batch: Batch, schedule: Schedule) -> None:
    """Discard the states of preempted requests.

    vLLM does not name them, and a request that is merely not scheduled in this step must
    keep its state. But vLLM never assigns the block of a state in use to another request. At
    a block boundary the block may be shared, and then its page holds the state too.
    """
    paused = storage.states.resident - schedule.scheduled.keys()
    if not paused:
        return
    assigned = schedule.assigned_blocks()
    requests = [batch.requests[req_id] for req_id in paused]
    blocks = storage.state_blocks(
        [request.blocks for request in requests], [request.done for request in requests]
    )
    storage.states.drop(
        {
            request.req_id
            for i, request in enumerate(requests)
            if any(held[i] in assigned for held in blocks.values())
        }
    )


def save(
    storage: LayerStorage,
    requests: Sequence[Request],
    scheduled: Mapping[str, int],
    before_write: Callable[[], None],
) -> None:
    """Write to pages the states that a later step may have to read from there.

    Args:
        storage: of a model with states.
        requests: that this step has computed, without drafts.
        scheduled: request id → tokens of this step.
        before_write: lets go of whatever refers to the pages.
    """
    block = storage.block_sizes[storage.states.groups[0]]
    keep, counts, unfinished = [], [], set()
    for request in requests:
        end = request.done = request.computed + scheduled[request.req_id]
        is_partial = end < request.num_tokens
        if is_partial:
            unfinished.add(request.req_id)
        if is_partial or (storage.keep_boundaries and end % block == 0):
            keep.append(request)
            counts.append(end)
    if keep:
        before_write()
        blocks = storage.state_blocks([request.blocks for request in keep], counts)
        storage.states.save([request.req_id for request in keep], blocks)
    if unfinished:
        storage.states.drop(unfinished)
