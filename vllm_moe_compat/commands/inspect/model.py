"""What an inspection finds, as plain data: what text, JSON and Markdown are made of.

The JSON form is these dataclasses, field by field; ``SCHEMA_VERSION`` is raised when a
field goes or changes its meaning, not when one is added. Sizes are bytes throughout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

SCHEMA_VERSION = 1

Severity: TypeAlias = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding.

    Attributes:
        id: its kind, one of ``problems.PROBLEMS``.
        severity: an error keeps the checkpoint from being served.
        message: the file or tensor, what was found, what was expected.
        remedy: what to do about it; empty where nothing has to be done.
    """

    id: str
    severity: Severity
    message: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Files:
    """What lies there.

    Attributes:
        shards: files that mlx-lm loads.
        tensors: tensors in them.
        tensor_bytes: their bytes.
        dtypes: safetensors' name → how many tensors.
    """

    shards: int
    tensors: int
    tensor_bytes: int
    dtypes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Which model it is, and who will serve it.

    Attributes:
        model_type: as config.json has it.
        architectures: likewise.
        module: the mlx-lm module that will load it; None where there is none.
        mapped: whether the registry has a row for it.
        mlx_lm: the version installed here, or None: the registry alone has answered.
    """

    model_type: str | None
    architectures: list[str]
    module: str | None
    mapped: bool
    mlx_lm: str | None


@dataclass(frozen=True, slots=True)
class LayerRun:
    """Layers that are alike.

    Attributes:
        layers: ``model.layers.0…2``.
        form: ``dense``, or that of the experts.
        experts: how many routed experts each has.
        dtypes: of the experts' weights.
    """

    layers: str
    form: str
    experts: int
    dtypes: list[str]


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts.

    Attributes:
        forms: those that occur: ``per-expert``, ``combined``, ``MLX form``, ``packed``.
        expected: how many a layer has by the config.
        projections: as they are called here.
        runs: what the layers hold, in order.
    """

    forms: list[str]
    expected: int | None
    projections: list[str]
    runs: list[LayerRun]


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the numbers are stored.

    Attributes:
        form: in words: ``block FP8``, ``MLX affine 4-bit g64``, ``bfloat16``, …
        method: ``quant_method`` of the config.
        weights: tensors that are quantised.
        blocks: rows and columns under one scale, as they occur.
        scale_dtypes: safetensors' names of the scales' dtypes.
        static_scales: scales of activations and caches, which MLX has no use for.
    """

    form: str
    method: str | None
    weights: int = 0
    blocks: list[list[int]] = field(default_factory=list)
    scale_dtypes: list[str] = field(default_factory=list)
    static_scales: int = 0


@dataclass(frozen=True, slots=True)
class Extra:
    """Something beside the language model.

    Attributes:
        kind: ``mtp`` (heads that predict further tokens), ``vision`` (towers of any
            other sense too), ``surplus experts``.
        tensors: how many.
        bytes: how large.
        loaded: how many of them the module loads; the others play no part.
        in_config: whether config.json speaks of it; None where no config does.
        agree: whether config and tensors say the same.
    """

    kind: str
    tensors: int
    bytes: int
    loaded: int
    in_config: bool | None
    agree: bool | None


@dataclass(frozen=True, slots=True)
class Stock:
    """What mlx-lm does with it without this package.

    Attributes:
        verdict: ``loads``; ``refuses``; ``wrong``: it loads and computes something else;
            ``refuses or wrong``; ``unsure``: it depends on code that headers do not show;
            ``unknown``: the registry has no row.
        reasons: why.
        unexpected: tensors that its module has no parameter for; it may find more.
    """

    verdict: str
    reasons: list[str]
    unexpected: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that is done to many tensors.

    Attributes:
        action: what.
        made: how many tensors come out; those that are changed or dropped otherwise.
        layers: how many layers they are in.
        targets: which, folded.
    """

    action: str
    made: int
    layers: int
    targets: str


@dataclass(frozen=True, slots=True)
class Ours:
    """What this package does.

    Attributes:
        verdict: ``loads``, ``refuses``, or ``unknown`` where it was not planned.
        steps: in order; none where the checkpoint is left as it is.
        workarounds: ids of the registry's that apply, and why each is there.
    """

    verdict: str
    steps: list[Step]
    workarounds: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Need:
    """What one ``VLLM_MOE_COMPAT_QUANTIZE`` takes.

    Attributes:
        setting: ``none`` or one that quantises.
        weights: bytes of the weights, once loaded.
        loading: bytes at the most while they are.
        fits: whether loading fits the machine's memory; None where that is unknown.
        fits_now: whether it fits what is free.
    """

    setting: str
    weights: int
    loading: int
    fits: bool | None
    fits_now: bool | None


@dataclass(frozen=True, slots=True)
class CacheKind:
    """What layers of one kind keep of a sequence.

    Attributes:
        kind: ``softmax``, ``window``, ``latent``, or as the config calls it:
            ``linear_attention``, ``mamba``, ``conv``, …
        layers: how many.
        bytes_per_1000_tokens: what they keep together; None where the config does not tell.
        window: tokens that are kept at most, where it is bounded.
        state_bytes: what they keep of a sequence whatever its length.
    """

    kind: str
    layers: int
    bytes_per_1000_tokens: int | None
    window: int | None = None
    state_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """What it takes.

    Attributes:
        dtype: of weights and caches that are not quantised.
        needs: one per setting that can be used.
        cache: by kind of layer; empty where the config does not tell.
        cache_note: why something is not known, or what was assumed.
        machine_total: bytes of this machine.
        machine_free: those free now.
        machine_note: what was asked.
    """

    dtype: str
    needs: list[Need]
    cache: list[CacheKind]
    cache_note: str
    machine_total: int
    machine_free: int
    machine_note: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """All of it; parts that could not be worked out are None."""

    path: str
    repository: str | None
    tool: str
    verdict: str
    exit_code: int
    findings: list[Problem]
    files: Files | None = None
    architecture: Architecture | None = None
    experts: Experts | None = None
    quantization: Quantization | None = None
    extras: list[Extra] = field(default_factory=list)
    stock: Stock | None = None
    ours: Ours | None = None
    memory: Memory | None = None
    schema_version: int = SCHEMA_VERSION
