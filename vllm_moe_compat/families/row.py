"""What is written down about one mlx-lm module: the form of a registry row.

The rows themselves are data, in ``registry``; the planner reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_moe_compat.checkpoint.extras import Extras
from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.checkpoint.names import layer_of

PER_EXPERT, COMBINED, TRANSPOSED = "per-expert", "combined", "combined, transposed"
GLU = ("gate_proj", "up_proj", "down_proj")
W123 = ("w1", "w3", "w2")


@dataclass(frozen=True, slots=True)
class Symptom:
    """The effect of a missing workaround on a checkpoint, by headers and config alone.

    Attributes:
        refuses: whether mlx-lm refuses the checkpoint; else it loads and computes something
            else.
        occurs: whether the effect occurs, by the layout and the config as it was read.
    """

    refuses: bool
    occurs: Callable[[Layout, Mapping[str, Any]], bool]


@dataclass(frozen=True, slots=True)
class Workaround:
    """One thing that upstream does not do yet, shared by the rows that need it.

    Attributes:
        id: short name, for tables and messages.
        why: what goes wrong without it.
        upstream: where upstream discusses it, or where its code is.
        remove_when: the condition on which the workaround goes.
        form: the checkpoint form that it serves.
        proofs: forms of ``upstream.forms`` in which upstream fails while it is needed.
        families: the recorded families that show it; the row's own where there are none.
        symptom: its effect where the plan does not show it; None where the plan does.
    """

    id: str
    why: str
    upstream: str
    remove_when: str
    form: str
    proofs: tuple[str, ...]
    families: tuple[str, ...] = ()
    symptom: Symptom | None = None


@dataclass(frozen=True, slots=True)
class SettingTranslation:
    """One thing in ``config.json`` that a module's arguments do not understand.

    Attributes:
        id: short name, for messages.
        why: what upstream reads wrongly.
        apply: changes the config and the dict in it that describes the language
            model (the same one where nothing is nested), in place and only where
            it has to; says whether it did.
    """

    id: str
    why: str
    apply: Callable[[dict[str, Any], dict[str, Any]], bool]


def _is_layer(prefix: str) -> bool:
    """Whether names with this prefix are right below a layer: ``model.layers.3.``."""
    layer = layer_of(prefix.removesuffix("."))
    return prefix.endswith(".") and layer is not None and f"{layer.path}." == prefix


@dataclass(frozen=True, slots=True)
class Moe:
    """Where a module's routed experts are in checkpoints, and where it wants them.

    Attributes:
        sources: paths of the experts in a checkpoint's layer; empty for the layer itself.
        target: path of the stacked experts in the module's layer.
        stacks: the forms that its ``sanitize`` brings there by itself.
        spelling: what the projections are called where it does: gate, up, down.
        projections: part → name of the stacked projection.
        transposed: how combined experts lie where the shapes allow both readings.
        interleaved: whether gate and up take turns in combined experts.
    """

    sources: tuple[str, ...] = ("mlp.experts",)
    target: str = "mlp.switch_mlp"
    stacks: tuple[str, ...] = (PER_EXPERT,)
    spelling: tuple[str, ...] = GLU
    projections: tuple[tuple[str, str], ...] = (
        ("gate", "gate_proj"),
        ("up", "up_proj"),
        ("down", "down_proj"),
    )
    transposed: bool = False
    interleaved: bool = False

    def source_of(self, path: str) -> str | None:
        """Return which of ``sources`` a path is, right below a layer; None where it is none."""
        return next(
            (
                source
                for source in self.sources
                if path.endswith(source)
                and _is_layer(f"{path}." if not source else path.removesuffix(source))
            ),
            None,
        )

    @property
    def gated(self) -> bool:
        """Whether experts have a gate projection besides up and down."""
        return len(self.projections) == 3


@dataclass(frozen=True, slots=True)
class NormShift:
    """Norms that checkpoints store less 1 and ``sanitize`` adds 1 to.

    It does so in the checkpoint's dtype, and only if it finds what it takes for the
    mark of a checkpoint that it has not seen yet.

    Attributes:
        suffixes: how the norms' names end.
        mark: ``conv1d``: a convolution in torch's order; ``per-expert``: a layer
            whose experts are not stacked; ``router``: a router under ``.moe.``.
    """

    suffixes: tuple[str, ...]
    mark: str


@dataclass(frozen=True, slots=True)
class Cache:
    """The differences between a module's cache and the one that its config implies.

    Attributes:
        expands_latent: whether latent attention (MLA) keeps the expanded keys and values
            instead of the latent.
        ignores_window: whether layers with a sliding window keep every token.
        attentions: how many attentions, each with keys and values, a layer has.
    """

    expands_latent: bool = False
    ignores_window: bool = False
    attentions: int = 1


@dataclass(frozen=True, slots=True)
class Row:
    """What is known about one mlx-lm module.

    Attributes:
        module: its import path; the class is its ``Model``.
        workarounds: what is done for it, and until when.
        moe: its experts' convention; None for a dense module.
        dropped_upstream: names that its ``sanitize`` drops.
        dropped_here: extras that it does not drop and the executor must.
        norm_shift: what it computes with.
        renames: patterns of names that it does not know, and what it calls them.
        splits: ends of fused tensors' names → the ends of their equal parts.
        digests: kinds of stored numbers that its ``sanitize`` turns into floats, in
            bfloat16: ``fp8 block 128``, ``fp8 tensor``.
        keeps: kinds of stored numbers, and packed forms of ``plan.check_packed``, that it
            reads and keeps packed: they are none of our business.
        latent: where ``kv_b_proj`` is left whole that the module wants split.
        model_types: further ``model_type`` s that are this module's.
        translations: settings of config.json that its arguments do not understand as written.
        sanitize_wrapper: called in place of ``sanitize`` with it, the model, the tensors and the
            config as it was read.
        cache: how its cache differs from the one that the config implies.
    """

    module: str
    workarounds: tuple[Workaround, ...] = ()
    moe: Moe | None = None
    dropped_upstream: Extras = field(default_factory=Extras)
    dropped_here: Extras = field(default_factory=Extras)
    norm_shift: NormShift | None = None
    renames: tuple[tuple[str, str], ...] = ()
    splits: tuple[tuple[str, tuple[str, ...]], ...] = ()
    digests: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    latent: bool = False
    model_types: tuple[str, ...] = ()
    translations: tuple[SettingTranslation, ...] = ()
    sanitize_wrapper: Callable[..., Any] | None = None
    cache: Cache = Cache()

    @property
    def ignored(self) -> Extras:
        """All names that play no part in the model, whoever drops them."""
        return self.dropped_upstream | self.dropped_here
