"""The fields of a registry row: the facts about one mlx-lm module that plans depend on.

The rows themselves are in ``moe``, ``deepseek`` and ``dense``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_moe_compat.checkpoint.extras import Extras
from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.checkpoint.names import layer_of
from vllm_moe_compat.families.fixes.fix import ForwardFix, LengthLimit

PER_EXPERT, COMBINED, TRANSPOSED = "per-expert", "combined", "combined, transposed"
READS_TYING, OWN_HEAD, HEAD_IF_STORED, NEVER_TIED = "reads", "own", "if stored", "never tied"
HEADS = {
    READS_TYING: "it has an output head unless tie_word_embeddings is true",
    OWN_HEAD: "it always has an output head, or computes with tied embeddings wrongly",
    HEAD_IF_STORED: "it has an output head if the checkpoint has one",
    NEVER_TIED: "it has an output head, and the model is not tied whatever the config says",
}
"""How a module makes logits."""
GLU = ("gate_proj", "up_proj", "down_proj")
W123 = ("w1", "w3", "w2")


@dataclass(frozen=True, slots=True)
class Symptom:
    """The effect of a missing workaround on a checkpoint, by headers and config alone.

    Attributes:
        refuses: whether mlx-lm refuses the checkpoint; else it loads and computes something
            else.
        occurs: whether the effect occurs, by the layout and the original config.
    """

    refuses: bool
    occurs: Callable[[Layout, Mapping[str, Any]], bool]


@dataclass(frozen=True, slots=True)
class Workaround:
    """A compensation for one gap in mlx-lm, shared by the rows that need it.

    Attributes:
        id: short name, for tables and messages.
        why: the failure without it.
        upstream: URL of upstream's discussion, or path of upstream's code.
        remove_when: the condition for its removal.
        form: the checkpoints that need it.
        proofs: checkpoint variants of ``probes.variants`` that fail in mlx-lm as long as the
            workaround is needed.
        families: recorded families that show the failure; those of the row if empty.
        symptom: the failure on a given checkpoint; None if the plan shows it.
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
    """A translation of settings in ``config.json`` into those that a module reads.

    Attributes:
        id: short name, for messages.
        why: the setting that upstream misreads.
        apply: takes the config and its section for the language model (the same dict if nothing
            is nested), translates in place where needed, and returns whether it changed
            anything.
        settings: keys that reach the module through it alone.
    """

    id: str
    why: str
    apply: Callable[[dict[str, Any], dict[str, Any]], bool]
    settings: tuple[str, ...] = ()


def _is_layer(prefix: str) -> bool:
    """Whether the prefix ends with a layer: ``model.layers.3.``."""
    layer = layer_of(prefix.removesuffix("."))
    return prefix.endswith(".") and layer is not None and f"{layer.path}." == prefix


@dataclass(frozen=True, slots=True)
class Moe:
    """The routed experts of a module: their names in releases and in the module.

    Attributes:
        sources: paths of the experts within a layer of a release, ``mlp.experts``; empty for
            the layer itself. The first is the path in the original release.
        target: path of the stacked experts within the module's layer, ``mlp.switch_mlp``.
        stacks: layouts of unquantised experts that the module's ``sanitize`` stacks.
        spelling: names of gate, up and down in the release that ``sanitize`` stacks.
        projections: pairs of part and name of the stacked projection.
        transposed: whether combined experts are ``[E, H, 2I]`` if their shapes fit both
            orientations.
        interleaved: whether rows of gate and up alternate in combined experts.
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
        """Return the entry of ``sources`` that a path has within its layer, or None."""
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
        """Whether experts have a gate projection in addition to up and down."""
        return len(self.projections) == 3


@dataclass(frozen=True, slots=True)
class NormShift:
    """Norm weights that releases store minus 1 and to which ``sanitize`` adds 1.

    ``sanitize`` adds in the checkpoint's dtype, and only if it finds a sign that the checkpoint
    is a release, not one that mlx-lm has saved.

    Attributes:
        suffixes: endings of the norms' names.
        mark: the sign: ``conv1d``, a convolution in torch's axis order; ``per-expert``, a layer
            with per-expert weights; ``router``, a router under ``.moe.``.
    """

    suffixes: tuple[str, ...]
    mark: str


@dataclass(frozen=True, slots=True)
class Cache:
    """Differences between a module's cache and the cache that its config implies.

    Attributes:
        expands_latent: whether latent attention (MLA) keeps the expanded keys and values
            instead of the latent.
        attentions: number of attentions per layer, each with keys and values.
        states_skip_padding: whether the code of layers with a state skips padding on the right
            of a row, so that rows of different lengths share a pass.
    """

    expands_latent: bool = False
    attentions: int = 1
    states_skip_padding: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """The facts about one mlx-lm module.

    Attributes:
        module: import path; its class ``Model`` is wrapped.
        workarounds: the gaps of mlx-lm that the row compensates for.
        moe: names and layouts of the routed experts; None for a dense module.
        dropped_upstream: extra tensors that the module's ``sanitize`` drops.
        dropped_here: extra tensors that ``sanitize`` does not drop, so that the plan does.
        norm_shift: norms that ``sanitize`` shifts by 1; None for none.
        renames: pairs of pattern and replacement that turn a name of some releases into the
            module's name.
        splits: pairs of the ending of a joined tensor and the endings of its equal parts.
        digests: kinds of stored numbers that ``sanitize`` dequantises, in bfloat16:
            ``fp8 block 128``, ``fp8 tensor``.
        misreads: kinds of stored numbers that ``sanitize`` dequantises to wrong values.
        keeps: kinds of stored numbers, and packed forms of ``plan.check_packed``, that the
            module computes with as they are; the plan leaves them alone.
        computed: endings of weights with which ``sanitize`` computes, so that they are floats
            even where MLX could hold them packed.
        latent: whether the plan splits ``kv_b_proj`` because ``sanitize`` does not.
        model_types: further values of ``model_type`` that the module loads.
        text_types: model types of the language model saved by itself, whose config the module
            wants under ``text_config``.
        translations: settings of config.json that the module's arguments misread.
        sanitize_wrapper: called in place of ``sanitize``, with upstream's ``sanitize``, the
            model, the tensors and the original config.
        cache: differences between the module's cache and the one that the config implies.
        fixes: settings that the module ignores and that are put into the instance.
        defaults: pairs of key and value of arguments that no config class of a release has,
            since its code takes them for granted.
        limits: settings that the module ignores, which is right up to some length.
        roots: all beginnings of names that can precede ``layers``, in releases and in the
            module; empty if they are not known.
        head: how the module makes logits; see ``HEADS``.
        embedding: name of the token embeddings' module.
        aliases: pairs of pattern and replacement for names that some uploads have, which are
            changed before anything is planned.
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
    misreads: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()
    latent: bool = False
    model_types: tuple[str, ...] = ()
    text_types: tuple[str, ...] = ()
    translations: tuple[SettingTranslation, ...] = ()
    sanitize_wrapper: Callable[..., Any] | None = None
    cache: Cache = Cache()
    fixes: tuple[ForwardFix, ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()
    limits: tuple[LengthLimit, ...] = ()
    roots: tuple[str, ...] = ("model.",)
    head: str = READS_TYING
    embedding: str = "embed_tokens"
    aliases: tuple[tuple[str, str], ...] = ()

    @property
    def ignored(self) -> Extras:
        """All extra tensors of the module's releases."""
        return self.dropped_upstream | self.dropped_here
