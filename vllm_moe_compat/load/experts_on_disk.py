"""Leave experts on disk, if ``VLLM_MOE_COMPAT_EXPERT_CACHE`` says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_moe_compat.load.context import LoadContext
from vllm_moe_compat.load.options import load_options
from vllm_moe_compat.plan.expert_cache import CachePlan, CacheSetting
from vllm_moe_compat.plan.experts_per_token import experts_per_token

if TYPE_CHECKING:
    from vllm_moe_compat.execute.quantize import SanitizedLoad


class Arrangement:
    """What is changed about a load before its tensors are made.

    Attributes:
        cache: the slots of each layer; None if all experts are loaded.
    """

    def __init__(self, load: LoadContext) -> None:
        self._load, self._options = load, load_options()
        self.cache: CachePlan | None = None

    def __call__(self, sanitized: SanitizedLoad, model: Any) -> None:
        """Arrange a load; see ``LoadOptions.arrange``.

        Raises:
            CompatError: it cannot be arranged as asked.
        """
        if self._options.arrange is not None:
            self._options.arrange(sanitized, model)
        planned = self._load.planned
        setting = CacheSetting.read() if planned.serving.experts_apart else None
        if setting is None or planned.layout is None or not planned.layout.experts:
            return
        from vllm_moe_compat.execute.stored_tensors import StoredTensors
        from vllm_moe_compat.expert_cache.install import install

        stored = StoredTensors(
            self._load.model_dir,
            planned.headers.tensors,
            self._load.plan.names,
            stamps=self._load.stamps,
        )
        per_token = experts_per_token(self._load.config, planned.module)
        self.cache = install(
            sanitized,
            model,
            stored,
            setting,
            per_token,
            self._options.settle,
            partial=not self._load.caller.strict,
        )
