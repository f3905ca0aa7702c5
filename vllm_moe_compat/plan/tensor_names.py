"""Bring tensor names to those that a module's releases have, before anything is planned.

Wrappers of a training run leave their prefix on every name: ``module.`` (DDP), ``_orig_mod.``
(``torch.compile``), ``base_model.model.`` (PEFT). A base model saved without its head lacks
``model.``, and a wrapper's own attribute doubles it. A prefix is changed only if the decoder
layers then stand where the row says that the module has them, and stood nowhere it knows
before; names that a row knows are never touched. What remains unknown is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from vllm_moe_compat.checkpoint.adapters import MERGE, adapter_tensors
from vllm_moe_compat.checkpoint.extras import Ignored
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.names import fold, layer_of
from vllm_moe_compat.errors import LayoutError, UnsupportedCheckpointError
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan.faults import Fault

T = TypeVar("T")
_WRAPPERS = ("module.", "base_model.model.")
_ANYWHERE = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_HEAD = "lm_head."
_OLD = (".gamma", ".beta")
_CHANGES = (
    ("model.", ""),
    ("", "model."),
    ("model.language_model.", "model."),
    ("language_model.", ""),
)
"""Changes of a beginning that are tried, in this order."""


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Changes of names that precede a plan.

    Attributes:
        renamed: pairs of a name in the files and the name in the plan, where they differ.
        copies: pairs of an absent tensor and the one whose values it has.
        drops: tensors that are left out.
        words: what was changed, for messages; empty for nothing.
        alone: whether every tensor that is not in ``renamed`` is left out.
    """

    renamed: tuple[tuple[str, str], ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    drops: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    alone: bool = False

    def of(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """Return the tensors under the plan's names."""
        if not (self.renamed or self.copies or self.drops or self.alone):
            return dict(tensors)
        new = dict(self.renamed)
        found = {
            new.get(name, name): tensor
            for name, tensor in tensors.items()
            if not self.alone or name in new
        }
        found.update({copy: found[source] for copy, source in self.copies if source in found})
        for name in self.drops:
            found.pop(name, None)
        return found

    def apply(self, weights: MutableMapping[str, T]) -> None:
        """Change the names in the loader's dict, in place; arrays are shared, not copied."""
        if self.renamed or self.copies or self.drops or self.alone:
            found = self.of(weights)
            weights.clear()
            weights.update(found)


def uniform_names(tensors: Collection[str], row: Row, extras: Ignored) -> TensorNames:
    """Return the changes that bring a checkpoint's names to those of the row's releases.

    Args:
        tensors: the names in the files.
        row: the module's row.
        extras: patterns of extra tensors, which may have decoder layers of their own.
    """
    plain = list(tensors)
    words: list[str] = []
    every = "\n".join(plain)
    if "_orig_mod." in every or "_wrapped_module." in every:
        words += sorted({f"removed {m[0]!r}" for n in plain for m in _ANYWHERE.finditer(n)})
        plain = [_ANYWHERE.sub("", name) for name in plain]
    if plain and row.roots and not any(_is_known(name, row) for name in plain):
        while wrapper := next((w for w in _WRAPPERS if all(n.startswith(w) for n in plain)), ""):
            plain = [name.removeprefix(wrapper) for name in plain]
            words.append(f"removed {wrapper!r}")
        if not any(_is_known(name, row) for name in plain):
            for old, new in _changes(plain):
                changed = [_replaced(name, old, new) for name in plain]
                if _has_known_layers(changed, row, extras):
                    plain = changed
                    words.append(
                        f"replaced {old!r} by {new!r}"
                        if old and new
                        else f"removed {old!r}"
                        if old
                        else f"added {new!r}"
                    )
                    break
    for pattern, new in row.aliases:
        alias = re.compile(pattern)
        changed = [alias.sub(new, name) for name in plain]
        words += [f"replaced {pattern!r} by {new!r}"] if changed != plain else []
        plain = changed
    if len(set(plain)) != len(plain):
        return TensorNames()
    renamed = tuple(pair for pair in zip(tensors, plain, strict=True) if pair[0] != pair[1])
    return TensorNames(renamed, words=tuple(words)) if renamed else TensorNames()


def _root(name: str) -> str | None:
    """Return what stands before the decoder layers, ``model.``; None outside of layers."""
    layer = layer_of(name)
    return None if layer is None else layer.prefix[: layer.prefix[:-1].rfind(".") + 1]


def _is_known(name: str, row: Row) -> bool:
    return _root(name) in row.roots


def _has_known_layers(names: Collection[str], row: Row, extras: Ignored) -> bool:
    """Whether all decoder layers are where the row has them, and there are some."""
    ignored = extras.select(names)
    roots = {root for name in names if name not in ignored and (root := _root(name)) is not None}
    return bool(roots) and roots <= set(row.roots)


def _changes(names: list[str]) -> Iterator[tuple[str, str]]:
    yield from _CHANGES
    prefix = ""
    for part in names[0].split(".")[:-1] if names else ():
        prefix += f"{part}."
        if not all(name.startswith(prefix) for name in names):
            return
        yield prefix, ""  # A wrapper of any name.


def _replaced(name: str, old: str, new: str) -> str:
    if not old and _HEAD in name:
        return name
    return new + name.removeprefix(old) if name.startswith(old) else name


def unknown_names(
    tensors: Mapping[str, TensorInfo], row: Row, words: frozenset[str]
) -> Iterator[Fault]:
    """Yield a fault if the tensors cannot be those of the row's module.

    No decoder layer is where the module has them, or not one matrix in a layer has a name with
    a word of the module's source, or norms have old names. A load would end at such a name.

    Args:
        tensors: the tensors that are loaded.
        row: the module's row.
        words: words of the names that the module knows; empty if its source is not there.
    """
    if not row.roots or not tensors:
        return
    module = row.module.rpartition(".")[2]
    if old := [n for n in tensors if n.endswith(_OLD) and n.rpartition(".")[2] not in words]:
        yield _unknown(
            tensors,
            old,
            "have endings of old normalisation layers, expected weight and bias",
            "rename gamma to weight and beta to bias",
        )
    inside = (name for name in tensors if layer_of(name) is not None)
    known = next((name for name in inside if _is_known(name, row)), None)
    if known is None:
        if found := [name for name in tensors if layer_of(name) is not None]:
            expected = " or ".join(f"{root}layers" for root in row.roots)
            yield _unknown(
                tensors,
                found,
                f"do not begin as those of {module}, expected {expected}",
                "save the checkpoint again from the model itself, without a wrapper around it",
            )
        return
    if words and not any(
        len(info.shape) > 1 and _words(name) & words and _is_known(name, row)
        for name, info in tensors.items()
    ):
        matrices = [n for n, info in tensors.items() if len(info.shape) > 1 and _is_known(n, row)]
        if matrices:
            yield _unknown(
                tensors,
                matrices,
                f"are no weights of {module}, expected the tensors of the model_type in "
                "config.json",
                "use the config.json that belongs to them",
            )


def _unknown(
    tensors: Mapping[str, TensorInfo], names: Sequence[str], found: str, remedy: str
) -> Fault:
    file = tensors[names[0]].file
    message = f"{file + ': ' if file else ''}{fold(names)} {found}"
    return Fault("names-unknown", message, remedy, LayoutError, len(names))


def _words(name: str) -> set[str]:
    """Return the words that tell which weight it is: ``q_proj``, ``experts gate_up_proj``."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    if parts[-1] in ("weight", "bias", "scales", "biases", "qweight", "weight_packed"):
        return {parts[-2]} if len(parts) > 1 else set()
    return set(parts[-2:])


def wrapped(tensors: Mapping[str, TensorInfo], module: str) -> Iterator[Fault]:
    """Yield a fault if names have a wrapper's prefix, for a module without a row.

    No module of mlx-lm has such names, and without a row nothing changes them.
    """
    names = [n for n in tensors if n.startswith(_WRAPPERS) or _ANYWHERE.search(n)]
    if names:
        yield _unknown(
            tensors,
            names,
            f"have the prefix of a wrapper, which {module} does not know, expected none",
            "save the checkpoint again from the model itself, without a wrapper around it",
        )


def unmerged(tensors: Mapping[str, TensorInfo]) -> Iterator[Fault]:
    """Yield a fault if tensors belong to an adapter that is not merged."""
    names = adapter_tensors(tensors)
    if names:
        file = tensors[names[0]].file
        yield Fault(
            "adapter-unmerged",
            f"{file + ': ' if file else ''}{fold(names)} belong{'s' if len(names) == 1 else ''} "
            "to an adapter that is not merged, where the weights of a model were expected",
            MERGE,
            UnsupportedCheckpointError,
            len(names),
        )
