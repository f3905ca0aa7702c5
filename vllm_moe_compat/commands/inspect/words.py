"""An inspection as titled sections, which text and Markdown render."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_moe_compat.commands.inspect.model import (
    CacheKind,
    ExpertCache,
    Extra,
    Inspection,
    Memory,
    PredictionHeads,
    Ranks,
)
from vllm_moe_compat.envs import EXPERT_CACHE, QUANTIZE
from vllm_moe_compat.load.report import size


@dataclass(frozen=True, slots=True)
class Table:
    """A table with column names."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Section:
    """A title, pairs of label and text, and possibly a table."""

    title: str
    pairs: list[tuple[str, str]]
    table: Table | None = None


def amount(count: int) -> str:
    """Format a size; a malicious header may claim any."""
    return size(count) if count < 2**70 else "more than any machine has"


def sections(found: Inspection) -> Iterator[Section]:
    """Yield the sections, in the order of a load."""
    yield Section("Checkpoint", list(_checkpoint(found)))
    if found.experts is not None:
        runs = Table(
            ("layers", "experts", "form", "dtype"),
            [(r.layers, f"{r.experts:,}", r.form, ", ".join(r.dtypes)) for r in found.experts.runs],
        )
        yield Section("Experts", list(_experts(found)), runs)
    if found.stock is not None:
        pairs = [("verdict", found.stock.verdict)]
        pairs += [("because", reason) for reason in found.stock.reasons]
        yield Section("mlx-lm by itself", pairs)
    if found.ours is not None:
        steps = Table(
            ("step", "what", "tensors", "layers", "which"),
            [
                (
                    str(number),
                    step.action,
                    f"{step.made:,}" if step.made else "",
                    f"{step.layers:,}" if step.layers else "",
                    step.targets,
                )
                for number, step in enumerate(found.ours.steps, start=1)
            ],
        )
        verdict = found.ours.verdict
        if verdict == "loads" and not steps.rows:
            verdict = "loads without changes"
        yield Section("With this package", [("verdict", verdict)], steps if steps.rows else None)
    if found.memory is not None:
        yield from _memory(found.memory)
    if found.prediction_heads is not None:
        yield _prediction_heads(found.prediction_heads)
    if found.ranks is not None:
        yield _ranks(found.ranks)


def _checkpoint(found: Inspection) -> Iterator[tuple[str, str]]:
    if found.repository is not None:
        yield "repository", found.repository
    if (known := found.architecture) is not None:
        names = f" ({', '.join(known.architectures)})" if known.architectures else ""
        yield "model", f"{known.model_type or 'unknown'}{names}"
        by = f"mlx-lm {known.mlx_lm}" if known.mlx_lm else "mlx-lm is not installed here"
        row = "" if known.mapped or known.module is None else "; no row in the registry"
        yield "module", f"{known.module or 'none'}{row} ({by})"
    if (files := found.files) is not None:
        dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in files.dtypes.items())
        shards = f"{files.shards:,} shard{'s' if files.shards != 1 else ''}"
        yield "tensors", f"{files.tensors:,} in {shards}, {amount(files.tensor_bytes)} ({dtypes})"
    if (numbers := found.quantization) is not None:
        parts = [numbers.form]
        if numbers.blocks:
            parts.append("blocks of " + ", ".join(f"{r}x{c}" for r, c in numbers.blocks))
        if numbers.scale_dtypes:
            parts.append("scales in " + ", ".join(numbers.scale_dtypes))
        if numbers.weights:
            parts.append(f"{numbers.weights:,} weights")
        if numbers.method is not None:
            parts.append(f"quant_method {numbers.method}")
        yield "numbers", ", ".join(parts)
    for extra in found.extras:
        yield extra.kind, _extra(extra)


def _extra(extra: Extra) -> str:
    parts = [f"{extra.tensors:,} tensors, {amount(extra.bytes)}"]
    if extra.tensors:
        parts.append(f"{extra.loaded:,} loaded" if extra.loaded else "not loaded")
    if extra.agree is not None:
        parts.append("as in the config" if extra.agree else "contradicts the config")
    return ", ".join(parts)


def _experts(found: Inspection) -> Iterator[tuple[str, str]]:
    experts = found.experts
    assert experts is not None
    yield "layout", " and ".join(experts.forms) or "unknown"
    if experts.expected is not None:
        yield "by the config", f"{experts.expected:,} in a layer"
    if experts.projections:
        yield "projections", ", ".join(experts.projections)


def _memory(memory: Memory) -> Iterator[Section]:
    needs = Table(
        (QUANTIZE.name, "weights", "loading", "fits"),
        [
            (n.setting, amount(n.weights), amount(n.loading), _fits(n.fits, n.fits_now))
            for n in memory.needs
        ],
    )
    machine = f"{amount(memory.machine_total)}, {amount(memory.machine_free)} free"
    pairs = [("weights", memory.dtype), ("machine", f"{machine} ({memory.machine_note})")]
    yield Section("Memory", pairs, needs)
    if memory.expert_cache is not None:
        yield _expert_cache(memory.expert_cache)
    kinds = Table(
        ("layers", "kind", "1,000 tokens", "a sequence"),
        [(f"{kind.layers:,}", kind.kind, _tokens(kind), _state(kind)) for kind in memory.cache],
    )
    yield Section("Cache", [("assumed", memory.cache_note)], kinds if memory.cache else None)


def _prediction_heads(heads: PredictionHeads) -> Section:
    pairs = [("in the files", f"{heads.tensors:,} tensors, {amount(heads.bytes)}")]
    if heads.stated is not None:
        pairs.append(("by the config", f"{heads.stated:,}"))
    if heads.weights is not None:
        costs = f"{amount(heads.weights)} of weights, and the cache of its layer"
        pairs.append(("with method mtp", f"the first head is loaded: {costs}"))
    pairs += [("cannot be used", reason) for reason in heads.refused]
    return Section("Prediction heads", pairs)


def _ranks(ranks: Ranks) -> Section:
    pairs = [
        ("divided", f"{amount(ranks.divided)}, of which a rank has its part"),
        ("on every rank", amount(ranks.whole)),
        *(("tensor parallelism refused", reason) for reason in ranks.tensor_refused),
    ]
    if ranks.pipeline_refused:
        pairs.append(("pipeline refused", ranks.pipeline_refused))
    rows: list[tuple[str, ...]] = []
    if not ranks.tensor_refused:
        option = f"--tensor-parallel-size {ranks.count}"
        rows.append((option, "each", "a part of all", amount(ranks.weights), amount(ranks.loading)))
    option = f"--pipeline-parallel-size {ranks.count}"
    for number, stage in enumerate(ranks.stages):
        layers = f"{stage.first}…{stage.last}" if stage.last > stage.first else f"{stage.first}"
        rows.append((option, f"{number}", layers, amount(stage.weights), amount(stage.loading)))
    columns = ("option", "rank", "layers", "weights", "loading")
    return Section("Ranks", pairs, Table(columns, rows) if rows else None)


def _expert_cache(cache: ExpertCache) -> Section:
    if cache.reason:
        return Section("Experts on disk", [("cannot", cache.reason)])
    of = f"{cache.per_token:,} of {cache.experts:,} experts in each of {cache.layers:,} layers"
    quantised = f" with {QUANTIZE.name}={cache.quantize}" if cache.quantize != "none" else ""
    pairs = [
        ("a token needs", of),
        ("all experts", f"{amount(cache.full)}{quantised}"),
        ("smallest cache", f"{amount(cache.least)}: {EXPERT_CACHE.name}={cache.least_setting}"),
    ]
    rows: list[tuple[str, ...]] = [
        (
            option.setting,
            amount(option.held),
            f"{option.slots:,}",
            amount(option.weights),
            amount(option.loading),
            _fits(option.fits, option.fits_now),
        )
        for option in cache.options
    ]
    columns = (EXPERT_CACHE.name, "experts held", "of a layer", "weights", "loading", "fits")
    return Section("Experts on disk", pairs, Table(columns, rows))


def _fits(ever: bool | None, now: bool | None) -> str:
    return "now" if now else "once memory is freed" if ever else "no"


def _tokens(kind: CacheKind) -> str:
    if kind.bytes_per_1000_tokens is None:
        return "unknown"
    if not kind.bytes_per_1000_tokens:
        return "none"
    up_to = f", {kind.window:,} tokens at most" if kind.window else ""
    return amount(kind.bytes_per_1000_tokens) + up_to


def _state(kind: CacheKind) -> str:
    if kind.state_bytes is not None:
        return amount(kind.state_bytes)
    return "unknown" if kind.bytes_per_1000_tokens is None else ""
