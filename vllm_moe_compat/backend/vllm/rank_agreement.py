"""What the ranks of one engine do the same in each step: passes, and the tokens they go on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.step.batch import Pass, Request
from vllm_moe_compat.backend.vllm.rank_group import RankGroup
from vllm_moe_compat.backend.vllm.sampling import TokenSampler
from vllm_moe_compat.envs import CHECK_RANKS
from vllm_moe_compat.ranks import same_tokens
from vllm_moe_compat.ranks.order_check import OrderCheck


class RankAgreement:
    """One rank among those that compute a model together."""

    def __init__(self, ranks: RankGroup, storage: LayerStorage, sampler: TokenSampler) -> None:
        self._ranks, self._storage, self._sampler = ranks, storage, sampler
        self._check = OrderCheck(ranks.group) if CHECK_RANKS.read() == "1" else None

    def first(self, own: str) -> str:
        """Return the first text of a rank that is not empty; all ranks call it."""
        return next(filter(None, self._ranks.exchange(own)), "")

    def begin_step(self) -> None:
        """Take note of a new step."""
        if self._check is not None:
            self._check.begin_step()

    def before_pass(self, work: Pass, logits: bool) -> None:
        """Compare a pass with that of the other ranks, if they are to be compared.

        Raises:
            RanksDisagreeError: they are about to evaluate something else.
        """
        if self._check is None:
            return
        facts = {
            "requests": work.req_ids,
            "tokens": work.tokens,
            "place of the tokens": (work.offsets.tolist(), work.lengths.tolist()),
            "pages": [request.blocks for request in work.requests],
            "states": sorted(self._storage.states.resident),
            "need of logits": logits,
        }
        self._check.agree("pass", facts)

    def on_tokens(
        self, known: Mapping[str, Request], order: Sequence[str], tokens: Sequence[list[int]]
    ) -> list[list[int]]:
        """Replace the tokens drawn here by those of the rank whose output counts.

        Args:
            known: the requests by id.
            order: ids of those that drew.
            tokens: of each; none of one that failed.
        """
        drawn = dict(zip(order, tokens, strict=True))
        req_ids = sorted(drawn)
        if self._check is not None:
            facts = {"requests": req_ids, "way of drawing": self._sampler.draws_all}
            self._check.agree("tokens", facts)
        self._ranks.heartbeat.progress()
        own = [drawn[req_id] for req_id in req_ids]
        requests = [known[req_id] for req_id in req_ids]
        most = 1 + max((len(request.drafts) for request in requests), default=0)
        told = same_tokens.tell(self._ranks.group, self._ranks.source, own, most)
        for request, mine, theirs in zip(requests, own, told, strict=True):
            if theirs != mine:
                drawn[request.req_id] = theirs
                self._sampler.replace(request, theirs)
        return [drawn[req_id] for req_id in order]
