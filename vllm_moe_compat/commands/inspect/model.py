"""The result of an inspection, as plain data; text, JSON and Markdown render it.

The JSON output has these dataclasses field by field. ``SCHEMA_VERSION`` is raised when a
field is removed or changes its meaning, not when one is added. All sizes are in bytes.
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
        id: its kind, a key of ``problems.PROBLEMS``.
        severity: a checkpoint with an error is not served.
        message: the file or tensor, the found and the expected state.
        remedy: the action to take; empty where none is needed.
    """

    id: str
    severity: Severity
    message: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Files:
    """The files of the checkpoint.

    Attributes:
        shards: number of files that mlx-lm loads.
        tensors: number of tensors in them.
        tensor_bytes: their size.
        dtypes: safetensors' name → number of tensors.
    """

    shards: int
    tensors: int
    tensor_bytes: int
    dtypes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Architecture:
    """The model and the mlx-lm module for it.

    Attributes:
        model_type: from config.json.
        architectures: from config.json.
        module: the mlx-lm module that will load it; None where there is none.
        mapped: whether the registry has a row for the module.
        mlx_lm: the installed version; None if it is not installed, and the module comes from
            the registry alone.
    """

    model_type: str | None
    architectures: list[str]
    module: str | None
    mapped: bool
    mlx_lm: str | None


@dataclass(frozen=True, slots=True)
class LayerRun:
    """A group of equal layers.

    Attributes:
        layers: their names, folded: ``model.layers.0…2``.
        form: ``dense``, or the form of the experts.
        experts: number of routed experts in each.
        dtypes: dtypes of the experts' weights.
    """

    layers: str
    form: str
    experts: int
    dtypes: list[str]


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts.

    Attributes:
        forms: ``per-expert``, ``combined``, ``stacked``, ``packed``, as they occur.
        expected: number of experts in a layer, by the config.
        projections: their names in this checkpoint.
        runs: the layers, grouped, in order.
    """

    forms: list[str]
    expected: int | None
    projections: list[str]
    runs: list[LayerRun]


@dataclass(frozen=True, slots=True)
class Quantization:
    """The stored form of the weights.

    Attributes:
        form: name of the form: ``block FP8``, ``MLX affine 4-bit g64``, ``bfloat16``, …
        method: ``quant_method`` of the config.
        weights: number of quantised tensors.
        blocks: ``[rows, columns]`` that share a scale, as they occur.
        scale_dtypes: safetensors' names of the scales' dtypes.
        static_scales: number of scales for activations and caches, which MLX does not use.
    """

    form: str
    method: str | None
    weights: int = 0
    blocks: list[list[int]] = field(default_factory=list)
    scale_dtypes: list[str] = field(default_factory=list)
    static_scales: int = 0


@dataclass(frozen=True, slots=True)
class Extra:
    """Tensors beside the language model.

    Attributes:
        kind: ``mtp`` (multi-token prediction), ``vision`` (towers for images or sound),
            ``surplus experts``.
        tensors: their number.
        bytes: their size.
        loaded: number of tensors that the module loads; the others are ignored.
        in_config: whether config.json describes them; None where it never does.
        agree: whether config and tensors agree.
    """

    kind: str
    tensors: int
    bytes: int
    loaded: int
    in_config: bool | None
    agree: bool | None


@dataclass(frozen=True, slots=True)
class Stock:
    """The behaviour of mlx-lm without this package.

    Attributes:
        verdict: ``loads``; ``refuses``; ``wrong`` (it loads and computes something else);
            ``refuses or wrong``; ``unsure`` (it depends on code that headers do not show);
            ``unknown`` (the registry has no row).
        reasons: the reasons for the verdict.
        unexpected: number of tensors without a parameter in the module; there may be more.
    """

    verdict: str
    reasons: list[str]
    unexpected: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the load, for all its tensors.

    Attributes:
        action: the step in words.
        made: number of tensors that it makes, or else changes or drops.
        layers: number of layers that they are in.
        targets: their names, folded.
    """

    action: str
    made: int
    layers: int
    targets: str


@dataclass(frozen=True, slots=True)
class PluginResult:
    """The behaviour of this package.

    Attributes:
        verdict: ``loads``, ``refuses``, or ``unknown`` where no load was planned.
        steps: in order; empty where the checkpoint is loaded as it is.
        workarounds: id of each workaround in the row → why it is needed.
    """

    verdict: str
    steps: list[Step]
    workarounds: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Need:
    """The memory that one value of ``VLLM_MOE_COMPAT_QUANTIZE`` needs.

    Attributes:
        setting: the value.
        weights: size of the loaded weights.
        loading: peak during the load.
        fits: whether the peak fits into the machine's memory; None where that is unknown.
        fits_now: whether it fits into the free memory.
    """

    setting: str
    weights: int
    loading: int
    fits: bool | None
    fits_now: bool | None


@dataclass(frozen=True, slots=True)
class CacheKind:
    """The cache of one sequence in layers of one kind.

    Attributes:
        kind: ``softmax``, ``window``, ``latent``, or as the config calls it:
            ``linear_attention``, ``mamba``, ``conv``, …
        layers: their number.
        bytes_per_1000_tokens: their total size; None where the config does not tell.
        window: maximum number of tokens kept, where it is bounded.
        state_bytes: size of their state, which does not depend on the sequence's length.
    """

    kind: str
    layers: int
    bytes_per_1000_tokens: int | None
    window: int | None = None
    state_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class CacheOption:
    """The memory that one value of ``VLLM_MOE_COMPAT_EXPERT_CACHE`` needs.

    Attributes:
        setting: the value.
        held: size of the experts in memory.
        slots: experts of a layer in memory; the smallest number, if layers differ.
        weights: size of the loaded weights, these experts included.
        loading: peak during the load.
        fits: whether the peak fits into the machine's memory.
        fits_now: whether it fits into the free memory.
    """

    setting: str
    held: int
    slots: int
    weights: int
    loading: int
    fits: bool
    fits_now: bool


@dataclass(frozen=True, slots=True)
class ExpertCache:
    """The caches of experts that are possible with the quantisation setting in force.

    Attributes:
        quantize: that setting.
        layers: number of layers with routed experts.
        experts: their number in a layer; the largest, if layers differ.
        per_token: experts of a layer that one token needs.
        full: size of all experts, in the form in which they are computed.
        least: size of the smallest cache.
        least_setting: the value of ``VLLM_MOE_COMPAT_EXPERT_CACHE`` for it.
        options: some values, the largest first.
        reason: why experts cannot stay on disk; empty if they can.
    """

    quantize: str
    layers: int
    experts: int
    per_token: int
    full: int
    least: int
    least_setting: str
    options: list[CacheOption]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory for weights and caches.

    Attributes:
        dtype: dtype of weights and caches that are not quantised.
        needs: one entry per usable setting.
        cache: one entry per kind of layer; empty where the config does not tell.
        cache_note: the assumption made, or the reason for missing entries.
        machine_total: memory of this machine.
        machine_free: memory that is free now.
        machine_note: the source of both.
        expert_cache: what keeping experts on disk saves; None for a model without any.
    """

    dtype: str
    needs: list[Need]
    cache: list[CacheKind]
    cache_note: str
    machine_total: int
    machine_free: int
    machine_note: str
    expert_cache: ExpertCache | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """A rank of a pipeline.

    Attributes:
        first: its first layer.
        last: its last layer.
        weights: bytes of its weights, embedding and head included.
        loading: peak bytes while loading.
    """

    first: int
    last: int
    weights: int
    loading: int


@dataclass(frozen=True, slots=True)
class Ranks:
    """Several ranks that compute the model together; ``--ranks``.

    Attributes:
        count: their number.
        weights: bytes of a rank's weights with ``--tensor-parallel-size``.
        loading: its peak bytes while loading.
        divided: bytes of all weights of which each rank has a part.
        whole: bytes of the weights that each rank has.
        tensor_refused: why ``--tensor-parallel-size`` is refused; empty if nothing is known.
        stages: the ranks with ``--pipeline-parallel-size``; empty if that is refused.
        pipeline_refused: why; empty if nothing is known.
    """

    count: int
    weights: int
    loading: int
    divided: int
    whole: int
    tensor_refused: list[str]
    stages: list[Stage]
    pipeline_refused: str


@dataclass(frozen=True, slots=True)
class PredictionHeads:
    """Multi-token-prediction heads, which are loaded only if speculation asks for them.

    Attributes:
        stated: their number by the config; None if it says nothing.
        tensors: number of their tensors in the files.
        bytes: size of those tensors.
        weights: bytes of the first head's weights once it is loaded; None if it cannot be used.
        refused: why it cannot be used, the gravest reason first.
    """

    stated: int | None
    tensors: int
    bytes: int
    weights: int | None
    refused: list[str]


@dataclass(frozen=True, slots=True)
class Inspection:
    """The whole result; parts that could not be determined are None."""

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
    ours: PluginResult | None = None
    memory: Memory | None = None
    ranks: Ranks | None = None
    prediction_heads: PredictionHeads | None = None
    schema_version: int = SCHEMA_VERSION
