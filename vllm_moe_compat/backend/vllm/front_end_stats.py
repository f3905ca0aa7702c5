"""Give vLLM's front end the stat logger for the expert cache.

vLLM's interface for metrics of others is ``StatLoggerBase``, whose loggers are arguments of
``AsyncLLM`` and ``LLMEngine``. ``vllm serve`` has no option for them. Its group of entry points
``vllm.stat_logger_plugins`` would switch statistics on for every server of the environment, with
whatever platform, and is not read for ``LLM``. So the argument is completed where both hand it
on, for configs that the platform has marked. Remove when a platform can name its stat loggers.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

from vllm_moe_compat.plan.expert_cache import CacheSetting

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_SETTING = "vllm_moe_compat_expert_cache_stats"
_MARK = "has_moe_compat_loggers"


def log_expert_cache(vllm_config: VllmConfig) -> None:
    """Mark a config and complete the front end's loggers, if there is a cache; idempotent.

    To be called in the process of the front end, which makes the config.
    """
    if CacheSetting.read() is None or not isinstance(vllm_config.additional_config, dict):
        return
    register_post_import_hook(_complete_loggers, "vllm.v1.metrics.loggers")
    vllm_config.additional_config[_SETTING] = True


def is_logged(vllm_config: VllmConfig) -> bool:
    """Whether the front end has a logger for the expert cache; to be asked by the engine."""
    extra = vllm_config.additional_config
    return isinstance(extra, dict) and bool(extra.get(_SETTING))


def _complete_loggers(module: Any) -> None:
    manager = module.StatLoggerManager
    if hasattr(manager, _MARK):
        return
    begin = manager.__init__
    signature = inspect.signature(begin)

    @functools.wraps(begin)
    def begin_with_ours(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        if is_logged(given.arguments["vllm_config"]):
            from vllm_moe_compat.backend.vllm.expert_cache_stats import ExpertCacheLogger

            # Before vLLM's own loggers, which would take its entry for a KV connector's.
            others = given.arguments.get("custom_stat_loggers") or ()
            given.arguments["custom_stat_loggers"] = [ExpertCacheLogger, *others]
        begin(*given.args, **given.kwargs)

    manager.__init__ = begin_with_ours
    setattr(manager, _MARK, True)
