"""Checkpoints with a prediction head whose decoder layer equals a layer of the target.

The tensors of one layer are there twice: as the target's, and under the names of the head. A
head that is loaded right therefore has the parameters of the target's own layer, which mlx-lm
loads without the code that is tested.
"""

from __future__ import annotations

import re

import torch

from support.checkpoints import Checkpoint
from vllm_moe_compat.families.prediction_heads import EMBEDDING, HEADS_BY_MODULE, OUTPUT

_LAYER = re.compile(r"^(?P<root>.*?)layers\.(?P<number>\d+)\.(?P<rest>.*)$")


def layer_count(tensors: dict[str, torch.Tensor]) -> int:
    """Return the number of decoder layers."""
    return 1 + max(int(m["number"]) for name in tensors if (m := _decoder_layer(name)))


def _decoder_layer(name: str) -> re.Match[str] | None:
    found = _LAYER.match(name)
    return None if found is None or "visual" in name or "vision" in name else found


def add_head(
    checkpoint: Checkpoint,
    module: str,
    layer: int | tuple[int, ...],
    index: int = 0,
    hidden: int = 64,
    copies: bool = False,
    mlp: int | None = None,
) -> dict[str, torch.Tensor]:
    """Add a head whose decoder layer is the target's ``layer``; return the tensors apart from it.

    Args:
        checkpoint: changed in place.
        module: name of the mlx-lm module.
        layer: number of the layer that is copied, or of those of a head of several.
        index: number of the head.
        hidden: width of the model.
        copies: whether the head repeats the target's embeddings and output head.
        mlp: number of the layer whose MLP is copied, if it is another one.
    """
    facts = HEADS_BY_MODULE[module]
    tensors = checkpoint.tensors = dict(checkpoint.tensors)  # They may be a reference's own.
    count = layer_count(tensors) - index
    root = next(m["root"] for name in tensors if (m := _decoder_layer(name)))
    at = {
        "root": "" if "mtp" in facts.own and module != "minimax_m3_vl" else root,
        "index": index,
        "number": count + index,
    }
    begin = facts.layer.format(**at)
    back = tuple((new, old) for old, new in facts.renames)
    for name in list(tensors):
        found = _decoder_layer(name)
        if found is None:
            continue
        rest = found["rest"]
        number = int(found["number"])
        if isinstance(layer, tuple):
            if number in layer:
                tensors[f"{begin}{layer.index(number)}.{rest}"] = tensors[name].clone()
            continue
        if number != (mlp if mlp is not None and rest.startswith("mlp.") else layer):
            continue
        for new, old in back:
            rest = old + rest.removeprefix(new) if rest.startswith(new) else rest
        tensors[begin + rest] = tensors[name].clone()
    generator = torch.Generator().manual_seed(17 + index)
    apart = {}
    for part, path in facts.parts.items():
        if part in (EMBEDDING, OUTPUT):
            continue
        shape = (hidden, 2 * hidden) if part == "join" else (hidden,)
        values = torch.randint(-32, 33, shape, generator=generator) / 64
        apart[part] = tensors[path.format(**at) + ".weight"] = values.to(torch.bfloat16).float()
    if copies:
        names = {EMBEDDING: "embed_tokens.weight", OUTPUT: "lm_head.weight"}
        for part, ending in names.items():
            found_name = next(n for n in tensors if n.endswith(ending) and "mtp" not in n)
            tensors[facts.parts[part].format(**at) + ".weight"] = tensors[found_name].clone()
    return apart
