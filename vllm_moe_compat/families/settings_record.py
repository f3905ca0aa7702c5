"""What each module does with each setting, as found by trying.

``settings_record.json`` holds, per mlx-lm module and kind of language model (``model_type`` of its
section), the class of every setting of transformers' config class. Each was changed alone in a
tiny model, and the logits of transformers and of the loaded folder were compared
(``tests/settings``). A setting is

- ``read``: the module reads it, and the numbers move with transformers';
- ``translated``: the same, under a key of the module's own;
- ``put in``: the same, by a forward fix of the row;
- ``inert``: it moves nothing;
- fixed: some values give wrong numbers, or no model. It is written as the list of the values that
  the module computes; as ``{"not": [...]}``, the values that it does not; for a setting that has
  an entry per layer, as ``{"without": [...]}``, the entries that it does not; or as
  ``{"as": [...]}``, the setting whose value it has to have, since the module reads that one alone.

Keys inside ``rope_parameters`` are settings of their own, ``rope_parameters.rope_theta``; those
that mean something for one kind of embedding name it, ``rope_parameters.factor (yarn)``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any, TypeAlias

READ, TRANSLATED, PUT_IN, INERT = "read", "translated", "put in", "inert"
WORDS = (READ, TRANSLATED, PUT_IN, INERT)
Class: TypeAlias = str | list[Any] | dict[str, list[Any]]
"""One of ``WORDS``, or the right or the wrong values of a fixed setting."""
Classes: TypeAlias = Mapping[str, Class]
ROPE = "rope_parameters"
NEVER = re.compile(
    # tokens, and what a config is about
    r".*_token_(id|index)s?|model_type|architectures|auto_map|transformers_version|_name_or_path"
    r"|(vision|audio|video|image|text)_\w+|(id2label|label2id|problem_type|quantization(_config)?)"
    # training, and what a forward pass returns or keeps
    r"|.*(dropout|_pdrop|_drop)|\w*init(ializer)?_\w+|.*_aux_loss\w*|aux_loss_\w+|seq_aux|.*jitter\w*"
    r"|.*z_loss\w*|gradient_checkpointing|output_(attentions|hidden_states|router_logits)"
    r"|return_dict|use_cache|use_return_dict|num_logits_to_keep|chunk_size_feed_forward"
    r"|is_encoder_decoder|is_decoder|(torch_)?dtype|pretraining_tp|ep_size|mtp_\w+|num_nextn_\w+"
    r"|_attn_implementation\w*|use_(mamba_kernels|flash_attn|flash_attention|associative_scan)"
    # how transformers derives other settings, which are settings themselves
    r"|_sliding_window_pattern|per_layer_config|global_head_dim|num_global_key_value_heads"
    r"|(parameters|type|original_)?rope_scaling"
)
"""Settings that never change the logits of text, in any module."""


@cache
def record() -> dict[str, dict[str, dict[str, Class]]]:
    """Return the record: module → kind → setting → class."""
    file = resources.files(__package__).joinpath("settings_record.json")
    found: dict[str, dict[str, dict[str, Class]]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def classes_of(module: str, kind: object) -> Classes:
    """Return the classes of a module's settings; empty if nothing is recorded.

    Args:
        module: import path, or its last part.
        kind: ``model_type`` of the language model. For a kind that was not tried, such as that of
            a model that shares the module, the kinds that were are joined, and a setting is fixed
            if it is so for one of them.
    """
    kinds = record().get(module.rpartition(".")[2], {})
    if isinstance(kind, str) and kind in kinds:
        return kinds[kind]
    joined: dict[str, Class] = {}
    for classes in kinds.values():
        for name, found in classes.items():
            joined[name] = _worse(joined.get(name, found), found)
    return joined


def class_of(classes: Classes, name: str) -> Class | None:
    """Return a setting's class; None if it has none.

    Without an entry for the kind of rotary embedding, the one for all kinds counts.
    """
    return classes[name] if name in classes else classes.get(name.partition(" (")[0])


def allows(found: Class | None, value: Any, settings: Mapping[str, Any]) -> bool:
    """Whether a setting of a class may have a value beside the others, by name."""
    if isinstance(found, dict):
        entries = value if isinstance(value, list) else ()
        return (
            value not in found.get("not", ())
            and not any(entry in found.get("without", ()) for entry in entries)
            and all(value == settings.get(other) for other in found.get("as", ()))
        )
    return not isinstance(found, list) or value in found


def named_settings(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the name and the value of each setting that may change the logits."""
    for key, value in settings.items():
        if key == ROPE and isinstance(value, Mapping):
            yield from _rope(value, ROPE)
        elif not NEVER.fullmatch(key):
            yield key, value


def _rope(rope: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    kind = rope.get("rope_type")
    for key, value in rope.items():
        if isinstance(value, Mapping):
            yield from _rope(value, f"{path}.{key}")
        elif key != "type":
            yield rope_name(f"{path}.{key}", kind), value


def rope_name(name: str, kind: object) -> str:
    """Return a rotary setting's name, with the kind of embedding that it belongs to."""
    common = name.endswith((".rope_type", ".rope_theta"))
    return name if common or kind in (None, "default") else f"{name} ({kind})"


def _worse(left: Class, right: Class) -> Class:
    if isinstance(left, list) and isinstance(right, list):
        return [value for value in left if value in right]
    for found in (left, right):
        if not isinstance(found, str):
            return found
    return min(left, right, key=WORDS.index)
