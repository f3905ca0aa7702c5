"""vLLM's definitions of prediction heads, run on transformers' layers: the oracle of the heads.

vLLM's layers need its kernels, which are not there on every machine. What it says about a head is
in one method, ``forward``, and in ``compute_logits``: which parts are joined in which order, what
is masked and normalised, and what is handed on. So the text of these two methods is taken from the
installed vLLM and run as it is, with the parts of a random head in place of vLLM's. The decoder
layer is transformers' own of the family.
"""

from __future__ import annotations

import ast
import functools
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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


Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Token ids, positions and hidden states → what logits are computed of, what is handed on."""


@dataclass(frozen=True)
class Definition:
    """Where vLLM defines a family's head, and how its parts are called there.

    ``parts`` are vLLM's names of join, norm of the embedding, norm of the hidden state and norm
    of the result. ``logits`` is the class whose ``compute_logits`` counts.
    """

    file: str
    layer: str
    logits: str
    parts: tuple[str, str, str, str]
    names: tuple[str, ...]

    def run(self, head: HeadModules, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Run a whole text: ``ids [T]`` and ``hidden [T, H]``.

        Returns:
            Logits ``[T, V]`` and the hidden states ``[T, H]`` for a further draft.
        """
        forward = method(self.file, self.layer, "forward")
        logits = method(self.file, self.logits, "compute_logits")
        join, of_embedding, of_hidden, of_result = self.parts
        norm = _Norm(head.norm)
        layer = SimpleNamespace(
            **{
                join: head.join if join != "eh_proj" or not self._joins_in_pairs else _paired(head),
                of_embedding: head.embedding_norm,
                of_hidden: head.hidden_norm,
                of_result: norm,
            },
            mtp_block=_Block(head.decoder),
            layers=[_Block(head.decoder)],
            num_mtp_layers=1,
            mtp_start_layer_idx=0,
            lm_head=head.output,
            logits_processor=lambda output, states: output(states),
            **self._inner(head),
        )
        if of_result == "shared_head":
            norm.head = head.output
        values = {
            "self": layer,
            "input_ids": ids,
            "positions": torch.arange(len(ids)),
            "previous_hidden_states": hidden,
            "hidden_states": hidden,
            # Some definitions write into it.
            "inputs_embeds": head.embed(ids).clone(),
        }
        found = forward(**{name: values[name] for name in self.names})
        for_logits, handed_on = found if isinstance(found, tuple) else (found, found)
        predictor = SimpleNamespace(
            num_mtp_layers=1,
            mtp_start_layer_idx=0,
            layers={"0": layer},
            mtp_layers={"0": layer},
            lm_head=head.output,
            logits_processor=lambda output, states: output(states),
        )
        own = (predictor, for_logits)
        rest = (head.output,) if "lm_head" in logits.__code__.co_varnames else ()
        return logits(*own, *rest), handed_on

    @property
    def _joins_in_pairs(self) -> bool:
        return self.file == "mimo_v2_mtp"

    def _inner(self, head: HeadModules) -> dict[str, Any]:
        """The parts of a decoder layer that ``forward`` spells out."""
        if not self._joins_in_pairs:
            return {}
        layer = head.decoder.layers[0]
        return {
            "input_layernorm": layer.input_layernorm,
            "self_attn": _Attention(head.decoder),
            "pre_mlp_layernorm": _Norm(layer.post_attention_layernorm),
            "mlp": layer.mlp,
        }


_NEXTN = ("eh_proj", "enorm", "hnorm", "shared_head")
_QWEN = ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
_LAYER = ("self", "input_ids", "positions", "previous_hidden_states", "inputs_embeds")
_EMBEDDED = ("self", "inputs_embeds", "positions", "previous_hidden_states")
_PREDICTOR = ("self", "input_ids", "positions", "hidden_states", "inputs_embeds")


def _nextn(file: str, stem: str) -> Definition:
    layer, predictor = f"{stem}MultiTokenPredictorLayer", f"{stem}MultiTokenPredictor"
    return Definition(file, layer, predictor, _NEXTN, _LAYER)


DEFINITIONS = {
    "qwen3_5_moe": Definition(
        "qwen3_5_mtp", "Qwen3_5MultiTokenPredictor", "Qwen3_5MTP", _QWEN, _PREDICTOR
    ),
    "qwen3_next": Definition(
        "qwen3_next_mtp", "Qwen3NextMultiTokenPredictor", "Qwen3NextMTP", _QWEN, _PREDICTOR
    ),
    "exaone_moe": Definition(
        "exaone_moe_mtp", "ExaoneMoeMultiTokenPredictor", "ExaoneMoeMTP", _QWEN, _PREDICTOR
    ),
    "deepseek_v3": _nextn("deepseek_mtp", "DeepSeek"),
    "glm4_moe": _nextn("glm4_moe_mtp", "Glm4Moe"),
    "glm4_moe_lite": _nextn("glm4_moe_lite_mtp", "Glm4MoeLite"),
    "ernie4_5_moe": Definition(
        "ernie_mtp",
        "ErnieMultiTokenPredictorLayer",
        "ErnieMultiTokenPredictor",
        ("mtp_linear_proj", "mtp_emb_norm", "mtp_hidden_norm", "none"),
        _EMBEDDED,
    ),
    "mimo": Definition(
        "mimo_mtp",
        "MiMoMultiTokenPredictorLayer",
        "MiMoMultiTokenPredictor",
        ("input_proj", "token_layernorm", "hidden_layernorm", "final_layernorm"),
        _EMBEDDED,
    ),
    "mimo_v2_flash": Definition(
        "mimo_v2_mtp",
        "MiMoV2MTPLayer",
        "MiMoV2MultiTokenPredictor",
        ("eh_proj", "enorm", "hnorm", "final_layernorm"),
        _EMBEDDED,
    ),
}
"""Family → vLLM's definition of its head."""
DEFINITIONS["qwen3_5"] = DEFINITIONS["qwen3_5_moe"]


@functools.cache
def method(file: str, owner: str, name: str) -> Callable[..., Any]:
    """Return a method as the installed vLLM has it, without importing its module."""
    path = folder("vllm") / "model_executor" / "models" / f"{file}.py"
    tree = ast.parse(Path(path).read_text())
    (kind,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner]
    (found,) = [n for n in kind.body if isinstance(n, ast.FunctionDef) and n.name == name]
    text = "from __future__ import annotations\n" + textwrap.dedent(ast.unparse(found))
    alone = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    known: dict[str, Any] = {"torch": torch, "get_pp_group": lambda: alone}
    exec(compile(text, str(path), "exec"), known)
    made: Callable[..., Any] = known[name]
    return made


class _Norm:
    """A norm as vLLM calls it: with a residual, it returns the sum too."""

    def __init__(self, norm: Any) -> None:
        self.norm, self.head = norm, None

    def __call__(self, states: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return self.norm(states)
        return self.norm(states + residual), states + residual


class _Block:
    """A decoder layer as vLLM calls it: its result is the sum of the two that it returns."""

    use_attn_reduce_scatter_for_moe = use_sequence_parallel_moe = False

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder

    def __call__(
        self, positions: Tensor, hidden_states: Tensor, residual: None
    ) -> tuple[Tensor, Tensor]:
        assert residual is None
        found = self.decoder(
            inputs_embeds=hidden_states[None], position_ids=positions[None], use_cache=False
        )
        half = found.last_hidden_state[0] / 2
        return half, half


class _Attention:
    """The attention of a layer with a sliding window, as vLLM calls it."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder

    def __call__(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        decoder, (kind,) = self.decoder, set(self.decoder.config.layer_types)
        distance = positions[:, None] - positions
        hidden = (distance < 0) | (distance >= decoder.config.sliding_window)
        found, _ = decoder.layers[0].self_attn(
            hidden_states=hidden_states[None],
            attention_mask=torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[None, None],
            position_embeddings=decoder.rotary_emb(hidden_states[None], positions[None], kind),
        )
        attended: Tensor = found[0]
        return attended


def _paired(head: HeadModules) -> Callable[[Tensor], tuple[Tensor, None]]:
    return lambda states: (head.join(states), None)
