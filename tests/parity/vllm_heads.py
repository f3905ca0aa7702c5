"""vLLM's definitions of prediction heads, run on transformers' layers: the oracle of the heads.

vLLM's layers need its kernels, which are not there on every machine. What it says about a head is
in one method, ``forward``, and in ``compute_logits``: which parts are joined in which order, what
is masked and normalised, and what is handed on. So the text of these two methods is taken from the
installed vLLM and run as it is, with the parts of a random head in place of vLLM's. The decoder
layer is transformers' own of the family.
"""

from __future__ import annotations

import ast
import copy
import functools
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from parity.available import folder

Tensor = torch.Tensor


@dataclass
class HeadModules:
    """The parts of a random head, on torch.

    Attributes:
        decoder: transformers' model of the one layer, without embeddings and final norm.
        embed: the target's embeddings.
        output: the target's output head.
    """

    decoder: Any
    join: Any
    embedding_norm: Any
    hidden_norm: Any
    norm: Any
    embed: Any
    output: Any


@dataclass(frozen=True)
class Definition:
    """Where vLLM defines a family's head, and how it names what the head consists of.

    Attributes:
        file: in ``vllm/model_executor/models``.
        layer: class whose ``forward`` counts.
        logits: class whose ``compute_logits`` counts.
        parts: names of the join, the norm of the embedding, that of the hidden state and that of
            the result.
        given: names of what ``forward`` is given.
        spelled_out: ``forward`` computes the decoder layer itself, by its parts.
        paired: the join returns a pair.
        summed: the decoder layer returns the sum of the two.
    """

    file: str
    layer: str
    logits: str
    parts: tuple[str, str, str, str]
    given: tuple[str, ...]
    spelled_out: bool = False
    paired: bool = False
    summed: bool = False

    def run(self, head: HeadModules, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Run a whole text: ``ids [T]`` and ``hidden [T, H]``.

        Returns:
            Logits ``[T, V]`` and the hidden states ``[T, H]`` for a further draft.
        """
        values = {
            "input_ids": ids,
            "positions": torch.arange(len(ids)),
            "previous_hidden_states": hidden,
            "hidden_states": hidden,
            # Some definitions write into it.
            "inputs_embeds": head.embed(ids).clone(),
        }
        modules = self._modules(head)
        forward = method(self.file, self.layer, "forward")
        found = forward(modules, **{name: values[name] for name in self.given})
        for_logits, handed_on = found if isinstance(found, tuple) else (found, found)
        compute_logits = method(self.file, self.logits, "compute_logits")
        taken = compute_logits.__code__.co_varnames
        output = {"lm_head": head.output} if "lm_head" in taken else {}
        return compute_logits(modules, for_logits, **output), handed_on

    def _modules(self, head: HeadModules) -> SimpleNamespace:
        """Return what both methods find in ``self``."""
        norm, block = _Norm(head.norm, head.output), _Block(head.decoder)
        parts = (head.join, head.embedding_norm, head.hidden_norm, norm)
        made = SimpleNamespace(
            **dict(zip(self.parts, parts, strict=True)),
            mtp_block=(lambda **given: sum(block(**given))) if self.summed else block,
            num_mtp_layers=1,
            mtp_start_layer_idx=0,
            lm_head=head.output,
            logits_processor=lambda output, states: output(states),
        )
        if self.parts[3] != "shared_head":
            made.shared_head = _Norm(lambda states: states, head.output)
        # One looks for the block here, the other for the layer that has the norm.
        made.layers = made.mtp_layers = {0: block, "0": made}
        if self.paired:
            setattr(made, self.parts[0], lambda states: (head.join(states), None))
        if self.spelled_out:
            layer = head.decoder.layers[0]
            made.input_layernorm = layer.input_layernorm
            made.self_attn = _Attention(head.decoder)
            made.post_attention_layernorm = layer.post_attention_layernorm
            made.pre_mlp_layernorm = _Norm(layer.post_attention_layernorm)
            made.mlp = lambda states: layer.mlp(states[None])[0]
        return made


@dataclass(frozen=True)
class _LayerByLayer(Definition):
    """A head of several layers, the first of which joins, and the last of which normalises.

    Attributes:
        layers: their classes.
    """

    layers: tuple[str, ...] = ()

    def _modules(self, head: HeadModules) -> SimpleNamespace:
        made = super()._modules(head)
        made.pattern_len = len(self.layers)
        made.layers = {}
        for index, name in enumerate(self.layers):
            decoder = copy.copy(head.decoder)
            decoder._modules = head.decoder._modules | {"layers": [head.decoder.layers[index]]}
            layer = layer_class(self.file, name, "forward")(decoder)
            join, of_embedding, of_hidden, _ = self.parts
            layer.has_start_projections = index == 0
            layer.has_end_norm = index == len(self.layers) - 1
            setattr(layer, join, lambda states: (head.join(states), None))
            setattr(layer, of_embedding, head.embedding_norm)
            setattr(layer, of_hidden, head.hidden_norm)
            layer.final_layernorm = head.norm
            made.layers[str(index)] = layer
        return made


_NEXTN = ("eh_proj", "enorm", "hnorm", "shared_head")
_QWEN = ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
_LAYER = ("input_ids", "positions", "previous_hidden_states", "inputs_embeds")
_EMBEDDED = ("inputs_embeds", "positions", "previous_hidden_states")
_PREDICTOR = ("input_ids", "positions", "hidden_states", "inputs_embeds")


def _nextn(file: str, stem: str) -> Definition:
    layer, predictor = f"{stem}MultiTokenPredictorLayer", f"{stem}MultiTokenPredictor"
    return Definition(file, layer, predictor, _NEXTN, _LAYER)


_QWEN3_5 = Definition("qwen3_5_mtp", "Qwen3_5MultiTokenPredictor", "Qwen3_5MTP", _QWEN, _PREDICTOR)
DEFINITIONS = {
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5,
    "qwen3_next": Definition(
        "qwen3_next_mtp", "Qwen3NextMultiTokenPredictor", "Qwen3NextMTP", _QWEN, _PREDICTOR
    ),
    "exaone_moe": Definition(
        "exaone_moe_mtp", "ExaoneMoeMultiTokenPredictor", "ExaoneMoeMTP", _QWEN, _PREDICTOR
    ),
    "deepseek_v3": _nextn("deepseek_mtp", "DeepSeek"),
    "glm4_moe": _nextn("glm4_moe_mtp", "Glm4Moe"),
    "glm4_moe_lite": _nextn("glm4_moe_lite_mtp", "Glm4MoeLite"),
    "step3p7": replace(_nextn("step3p5_mtp", "Step3p5A"), summed=True),
    "ernie4_5_moe": Definition(
        "ernie_mtp",
        "ErnieMultiTokenPredictorLayer",
        "ErnieMultiTokenPredictor",
        ("mtp_linear_proj", "mtp_emb_norm", "mtp_hidden_norm", "none"),
        _EMBEDDED,
    ),
    "nemotron_h": _LayerByLayer(
        "nemotron_h_mtp",
        "NemotronHMultiTokenPredictor",
        "NemotronHMTP",
        ("eh_proj", "enorm", "hnorm", "final_layernorm"),
        _PREDICTOR,
        layers=("NemotronHMTPAttentionDecoderLayer", "NemotronHMTPMoEDecoderLayer"),
    ),
    "mimo_v2_flash": Definition(
        "mimo_v2_mtp",
        "MiMoV2MTPLayer",
        "MiMoV2MultiTokenPredictor",
        ("eh_proj", "enorm", "hnorm", "final_layernorm"),
        _EMBEDDED,
        spelled_out=True,
        paired=True,
    ),
    "bailing_hybrid": Definition(
        "bailing_moe_mtp",
        "BailingMoeV25MultiTokenPredictorLayer",
        "BailingMoeV25MultiTokenPredictor",
        ("eh_proj", "enorm", "hnorm", "final_layernorm"),
        _LAYER,
        spelled_out=True,
    ),
}
"""Family → vLLM's definition of its head."""


def method(file: str, owner: str, name: str) -> Callable[..., Any]:
    """Return a method as the installed vLLM has it, without importing its module."""
    found: Callable[..., Any] = getattr(layer_class(file, owner, name), name)
    return found


@functools.cache
def layer_class(file: str, owner: str, name: str) -> type:
    """Return a class that has a method of vLLM's class, and is a ``_Block`` otherwise."""
    path = folder("vllm") / "model_executor" / "models" / f"{file}.py"
    tree = ast.parse(path.read_text())
    (kind,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner]
    (found,) = [n for n in kind.body if isinstance(n, ast.FunctionDef) and n.name == name]
    inside = textwrap.indent(ast.unparse(found), "    ")
    text = f"from __future__ import annotations\nclass {owner}(_Block):\n{inside}\n"
    alone = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    known = {"torch": torch, "get_pp_group": lambda: alone, "_Block": _Block}
    exec(compile(text, str(path), "exec"), known)
    made: type = known[owner]
    return made


class _Norm:
    """A norm as vLLM calls it: with a residual, it returns the sum too."""

    def __init__(self, norm: Any, head: Any = None) -> None:
        self.norm, self.head = norm, head

    def __call__(self, states: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return self.norm(states)
        return self.norm(states + residual), states + residual


class _Block:
    """A decoder layer as vLLM calls it: its result is the sum of the two that it returns."""

    use_attn_reduce_scatter_for_moe = use_sequence_parallel_moe = False

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder

    def __call__(self, **given: Any) -> tuple[Tensor, Tensor]:
        return self.forward(**given)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        states = hidden_states if residual is None else hidden_states + residual
        places = None if positions is None else positions[None]
        found = self.decoder(inputs_embeds=states[None], position_ids=places, use_cache=False)
        half = found.last_hidden_state[0] / 2
        return half, half


class _Attention:
    """The attention of a decoder's layer, as vLLM calls it."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder

    def __call__(self, hidden_states: Tensor, positions: Tensor) -> Tensor:
        decoder, config = self.decoder, self.decoder.config
        distance = positions[:, None] - positions
        hidden = distance < 0
        if window := getattr(config, "sliding_window", None):
            hidden |= distance >= window
        kinds = () if window is None else config.layer_types[:1]  # Each has embeddings of its own.
        found, _ = decoder.layers[0].self_attn(
            hidden_states=hidden_states[None],
            attention_mask=torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[None, None],
            position_embeddings=decoder.rotary_emb(hidden_states[None], positions[None], *kinds),
        )
        attended: Tensor = found[0]
        return attended
