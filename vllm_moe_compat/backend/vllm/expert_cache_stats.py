"""Counters of the expert cache, from the engine's process to vLLM's metrics and log.

The worker counts, and the output of each step carries the totals to the scheduler (``StepOutput``).
The scheduler adds what came on since the last step to vLLM's ``SchedulerStats``, which the front
end hands to its stat loggers. One of them is ours: it feeds Prometheus counters, which ``/metrics``
shows, and writes a line beside vLLM's own.

``SchedulerStats`` has one field for numbers that vLLM does not know, that of KV connectors, and the
platform refuses those. vLLM's own loggers would take our entry for a connector's, so our logger
comes before them and takes the entry out. Without our logger, nothing is put in: the config, which
the front end makes, says whether there is one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_moe_compat.expert_cache.counters import counters, layers
from vllm_moe_compat.load.report import expert_use
from vllm_moe_compat.log import logger

if TYPE_CHECKING:
    from prometheus_client import Counter
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import SchedulerStats

ENTRY = "vllm_moe_compat:expert_cache"
"""Key of the entry in ``SchedulerStats.kv_connector_stats``, and start of the metrics' names."""
METRICS = {
    "hits": "Uses of experts that were in memory, one for each layer, pass and expert.",
    "misses": "Uses of experts that had to be read from disk.",
    "bytes_read": "Bytes of the experts that were read from disk, as they are held in memory.",
    "seconds_waited": "Seconds that passes waited for experts.",
}
"""Name of a count → its description."""

Counts = Mapping[str, float]


class ExpertCounts:
    """The counts of one engine, of which a process may have had others before."""

    def __init__(self) -> None:
        """Begin at zero."""
        self._before = counters()

    def __call__(self) -> dict[str, float]:
        """Return the counts since the engine's start; empty without a cache."""
        if not layers():
            return {}
        found = counters() - self._before
        return {name: getattr(found, name) for name in METRICS}


class CountsSinceLastStep:
    """Turns totals into what came on since the last report."""

    def __init__(self) -> None:
        """Begin at zero."""
        self._reported: dict[str, float] = {}
        self._totals: dict[str, float] = {}

    def add(self, totals: Counts) -> None:
        """Take the totals of a step; empty where it counted nothing."""
        self._totals |= totals

    def take(self) -> dict[str, float]:
        """Return what came on; empty if nothing did."""
        found = {n: total - self._reported.get(n, 0) for n, total in self._totals.items()}
        self._reported = dict(self._totals)
        return found if any(found.values()) else {}


def put_in(stats: SchedulerStats, counts: Counts) -> None:
    """Put counts into vLLM's statistics of a step."""
    if counts:
        stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), ENTRY: dict(counts)}


@functools.cache
def _counters() -> dict[str, Counter]:
    """Return the Prometheus counters of this process, which all of its engines share."""
    from prometheus_client import Counter

    labels = ("model_name", "engine")
    return {name: Counter(f"{ENTRY}_{name}", text, labels) for name, text in METRICS.items()}


class ExpertCacheLogger(StatLoggerBase):
    """Feeds the metrics of one engine, and logs them."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        """Make the metrics, so that they are there before the first request."""
        labels = (str(vllm_config.model_config.served_model_name), str(engine_index))
        self._counters = {name: found.labels(*labels) for name, found in _counters().items()}
        self._logged: dict[str, float] = dict.fromkeys(METRICS, 0)

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        """Take our entry out of the stats, and count."""
        entries = None if scheduler_stats is None else scheduler_stats.kv_connector_stats
        if not entries or ENTRY not in entries:
            return
        counts = entries.pop(ENTRY)
        if not entries:
            scheduler_stats.kv_connector_stats = None
        for name, count in counts.items():
            self._counters[name].inc(count)
            self._logged[name] += count

    def log(self) -> None:
        """Log what came on since the last line; nothing if no expert was used."""
        counts, self._logged = self._logged, dict.fromkeys(METRICS, 0)
        if counts["hits"] or counts["misses"]:
            hits, misses, read = (int(counts[n]) for n in ("hits", "misses", "bytes_read"))
            logger.info("%s", expert_use(hits, misses, read, counts["seconds_waited"]))

    def log_engine_initialized(self) -> None:
        """Log nothing: the start-up line says what the cache holds."""
