"""Settle what the output head is: the embeddings, or a tensor of its own.

``tie_word_embeddings`` and the tensors may contradict each other. The rule is transformers 5's
(``PreTrainedModel.tie_weights``): with tied embeddings, a head that equals them is dropped; one
that differs is used; where only the head is stored, the embeddings are the head. mlx-lm's
modules drop the head of a tied checkpoint or refuse it, and some do not tie at all. So the
names and the config are changed before the module is built, and no module has to know.

Equality is that of bytes, dtype and shape. Tensors stored differently count as different,
which is right either way: the head is then used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.names import layer_of
from vllm_moe_compat.checkpoint.same_bytes import same_bytes
from vllm_moe_compat.errors import LayoutError
from vllm_moe_compat.families.row import NEVER_TIED, OWN_HEAD, READS_TYING, Row
from vllm_moe_compat.plan.faults import Fault

KEY = "tie_word_embeddings"
_HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class Heads:
    """The decision about the output head.

    Attributes:
        tie: value of ``tie_word_embeddings`` to set; None to leave it.
        drops: tensors that are not loaded.
        renamed: pairs of an old and a new name, if the head serves as the embeddings.
        copies: pairs of an absent tensor and the one whose values it has.
        faults: the reason why no head can be right.
        warnings: what a user should know.
    """

    tie: bool | None = None
    drops: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    faults: tuple[Fault, ...] = ()
    warnings: tuple[Fault, ...] = ()


def settle_heads(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    stored: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    row: Row,
    *,
    tied: Any,
) -> Heads:
    """Decide what the output head is.

    Args:
        folder: the checkpoint's folder, whose files are read if head and embeddings have the
            same dtype and shape.
        tensors: the tensors under the plan's names.
        stored: the same tensors, in the same order, under their names in the files.
        config: the effective config.
        row: the module's row.
        tied: ``tie_word_embeddings`` as transformers resolves it; None if it does not.

    Raises:
        CheckpointFileError: a file cannot be read.
    """
    outside = [
        name
        for name in tensors
        if (_HEAD in name or row.embedding in name) and layer_of(name) is None
    ]
    head = _parts(outside, _HEAD)
    embedding = _parts(outside, row.embedding)
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    stated = text.get(KEY, config.get(KEY))
    tied = stated if tied is None else tied
    if not row.roots or len(head) > 1 or len(embedding) > 1 or not (head or embedding):
        return Heads()
    if not head:
        return _without_head(tensors, embedding, tied, text.get(KEY), row)
    if not embedding:
        untied = tied is False or row.head == NEVER_TIED
        return Heads() if untied else _without_embedding(outside, tensors, head, row)
    if row.head in (OWN_HEAD, NEVER_TIED):
        return Heads(tie=False if tied is True else None)
    if stated is False and tied is not True:
        return Heads()
    in_files = dict(zip(tensors, stored, strict=True))
    ((head_stem, head_ends),) = head.items()
    ((stem, ends),) = embedding.items()
    names = tuple(f"{head_stem}.{end}" for end in head_ends)
    same = head_ends == ends and all(
        same_bytes(folder, stored, in_files[name], in_files[f"{stem}.{end}"])
        for name, end in zip(names, ends, strict=True)
    )
    if same:
        return Heads(tie=True, drops=names) if tied is True else Heads()
    differs = Fault(
        "head-differs",
        f"{names[0]} is an output head that differs from {stem}, though {KEY} is true; the head "
        "is used, as in transformers",
        f"set {KEY} to false in config.json to confirm",
        LayoutError,
    )
    tie = False if row.head == READS_TYING else None
    return Heads(tie=tie, warnings=(differs,) if tied is True else ())


def _parts(names: Iterable[str], last: str) -> dict[str, tuple[str, ...]]:
    """Return the stems that end with a module's name, each with the ends of its tensors.

    A bias is no part of the matrix: a tied head has one, the embeddings have none.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        stem, _, end = name.rpartition(".")
        if (stem == last or stem.endswith(f".{last}")) and end != "bias":
            found.setdefault(stem, []).append(end)
    return {stem: tuple(sorted(ends)) for stem, ends in found.items()}


def _without_head(
    tensors: Mapping[str, TensorInfo],
    embedding: Mapping[str, tuple[str, ...]],
    tied: Any,
    stated: Any,
    row: Row,
) -> Heads:
    ((stem, ends),) = embedding.items()
    outer = "language_model." if stem.startswith("language_model.") else ""
    if tied is True and row.head == OWN_HEAD:
        copies = tuple((f"{outer}{_HEAD}.{end}", f"{stem}.{end}") for end in ends)
        return Heads(tie=False, copies=copies)
    untied = stated is False and tied is not True
    if row.head == NEVER_TIED or (untied and row.head in (READS_TYING, OWN_HEAD)):
        file = tensors[f"{stem}.{ends[0]}"].file
        return Heads(
            faults=(
                Fault(
                    "head-missing",
                    f"{file + ': ' if file else ''}no tensor {outer}{_HEAD}.weight beside "
                    f"{stem}.{ends[0]}, expected one, since "
                    + (
                        "models of this kind are never tied"
                        if row.head == NEVER_TIED
                        else f"{KEY} is false, in config.json or by default"
                    ),
                    f"download the checkpoint again, or set {KEY} to true if the model was "
                    "trained with tied embeddings",
                    LayoutError,
                ),
            )
        )
    return Heads()


def _without_embedding(
    outside: Iterable[str],
    tensors: Mapping[str, TensorInfo],
    head: Mapping[str, tuple[str, ...]],
    row: Row,
) -> Heads:
    """Take the head for the embeddings."""
    roots = sorted(
        {
            root
            for name in tensors
            if (layer := layer_of(name))
            for root in row.roots
            if layer.prefix.startswith(root) and layer.prefix.count(".") == root.count(".") + 1
        }
    )
    if len(roots) != 1:
        return Heads()
    ((stem, ends),) = head.items()
    pairs = [(f"{roots[0]}{row.embedding}.{end}", f"{stem}.{end}") for end in ends]
    if row.head == OWN_HEAD:
        return Heads(tie=False, copies=tuple(pairs))
    return Heads(tie=True, renamed=tuple((old, new) for new, old in pairs))


def apply_tying(config: dict[str, Any], tie: bool | None) -> bool:
    """Set ``tie_word_embeddings`` in all sections, in place; return whether one changed."""
    if tie is None:
        return False
    text = config.get("text_config")
    sections = [config, text] if isinstance(text, dict) else [config]
    changed = any(section.get(KEY) is not tie for section in sections)
    for section in sections:
        section[KEY] = tie
    return changed
