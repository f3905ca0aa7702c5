"""Convert a checkpoint to MLX form, which mlx-lm loads without the plugin.

mlx-lm's ``load_model`` runs with the hooks installed: it picks the class, applies
``sanitize``, quantises modules and checks every name and shape. But the ``sanitize`` hook
returns stand-ins: arrays of the right shape and dtype that are never evaluated. The stand-ins
among the model's parameters, found by identity, tell how each parameter is made. So the
result is bit for bit that of a load, and the model is never in memory.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from vllm_moe_compat.checkpoint.config_file import read_config
from vllm_moe_compat.checkpoint.headers import read_headers
from vllm_moe_compat.checkpoint.names import fold, layer_of
from vllm_moe_compat.checkpoint.operations import Spec
from vllm_moe_compat.commands.convert.source import Source
from vllm_moe_compat.dtypes import STORED_NAMES, mlx_dtype
from vllm_moe_compat.errors import CompatError, UnsupportedCheckpointError
from vllm_moe_compat.execute import quantize as requantize
from vllm_moe_compat.execute.quantization_policy import QuantizationPolicy, held_formats
from vllm_moe_compat.execute.run_plan import tensor_infos
from vllm_moe_compat.load import patching
from vllm_moe_compat.load.context import current
from vllm_moe_compat.load.options import loading_with
from vllm_moe_compat.plan.effective_config import effective_config
from vllm_moe_compat.plan.estimate import nbytes
from vllm_moe_compat.plan.packing import packed_tensors
from vllm_moe_compat.plan.quantization import DEQUANTIZED


class _StandIns:
    """The executor that makes stand-ins instead of tensors.

    Attributes:
        pending: the tensors to make; None where the class has no row.
        pieces: id of a stand-in → its piece, and its name in the piece.
        keep: the stand-ins; their ids are unique only while they live.
        ignored: tensors of the checkpoint that the model does not use.
        widened: number of weights that a load would hold packed, and mlx-lm's layers cannot.
    """

    def __init__(self, cast: str) -> None:
        self._cast = cast
        self.pending: requantize.SanitizedLoad | None = None
        self.pieces: dict[int, tuple[requantize.PackedBuild, str]] = {}
        self.keep: list[mx.array] = []
        self.ignored: frozenset[str] = frozenset()
        self.widened = 0

    def __call__(
        self,
        load: requantize.QuantizedLoad,
        weights: Any,
        sanitize: Callable[[dict[str, mx.array]], Mapping[str, mx.array]],
        model: Any,
        done: object,
    ) -> tuple[dict[str, mx.array], QuantizationPolicy]:
        """Take the place of ``requantize.load_quantized``."""
        if (context := current.get()) is not None:
            layout = context.planned.layout
            self.ignored = frozenset() if layout is None else layout.ignored
        pending = self.pending = requantize.sanitize_stand_ins(load, weights, sanitize, model)
        self.widened = load.plan.held - pending.policy.held
        if self._cast:
            kind, may = mlx_dtype(self._cast), _may_cast(model)
            for piece in pending.builds:
                if piece.names[0] in pending.floats:
                    held, names = pending.floats, piece.names
                elif piece.build.parts:
                    continue
                else:
                    held, names = pending.sources, piece.build.weights
                for name in names:
                    if may(piece.names[0]) and mx.issubdtype(held[name].dtype, mx.floating):
                        held[name] = held[name].astype(kind)
        result = dict(pending.finished)
        for piece in pending.builds:
            for name, spec in _results(piece, pending).items():
                stand_in = mx.zeros(spec.shape, dtype=mlx_dtype(spec.dtype))
                self.pieces[id(stand_in)] = piece, name
                self.keep.append(stand_in)
                result[name] = stand_in
        return result, pending.policy


def _results(piece: requantize.PackedBuild, pending: requantize.SanitizedLoad) -> dict[str, Spec]:
    """Return the specs of the tensors that a build makes."""
    held = pending.floats if piece.names[0] in pending.floats else pending.sources
    names = piece.names if held is pending.floats else piece.build.weights
    tensors = dict(pending.load.tensors)
    if held is pending.floats:
        (given,) = tensor_infos({names[0]: held[names[0]]}).values()
        specs: tuple[Spec, ...] = (Spec(given.dtype, given.shape),)
    else:
        if not piece.build.parts:  # An array may have been cast since its header was read.
            tensors |= tensor_infos({name: held[name] for name in names})
        specs = piece.build.results(tensors, STORED_NAMES[piece.dtype])
    found: dict[str, Spec] = {}
    for name, spec, packing in zip(piece.names, specs, piece.formats, strict=True):
        if packing is None:
            found[name] = spec
            continue
        for kind, part in packed_tensors(packing, spec).items():
            found[f"{name.removesuffix('.weight')}.{kind}"] = part
    return found


def _may_cast(model: Any) -> Callable[[str], bool]:
    may = getattr(model, "cast_predicate", None)
    return (lambda name: True) if may is None else may


def mlx_source(folder: Path, setting: str, cast: str) -> Source:
    """Plan the conversion; the hooks must be installed and the environment set.

    Args:
        folder: the checkpoint.
        setting: quantisation: ``none`` or a key of ``QUANTIZE_SETTINGS``.
        cast: dtype of every floating-point tensor; empty to keep the dtypes of a load.

    Raises:
        CompatError: the checkpoint cannot be loaded right.
        UnsupportedCheckpointError: mlx-lm has no such model, or refuses it.
    """
    import mlx_lm.utils
    from mlx.utils import tree_flatten

    stand_ins = _StandIns(cast)
    try:
        with loading_with(executor=stand_ins):
            model, config = mlx_lm.utils.load_model(folder, lazy=True)
    except CompatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refused(folder, error) from error
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    may = _may_cast(model)
    keep_vision = "vision_tower" in getattr(model, "model", {})
    kinds = {path: _settings(module) for path, module in model.named_modules()}
    # Another reference to an array would keep its values in memory.
    del model
    if stand_ins.pending is not None:
        stand_ins.pending.finished.clear()
    gc.collect()

    pieces = stand_ins.pieces
    if cast:
        for name, array in arrays.items():
            fits = may(name) and mx.issubdtype(array.dtype, mx.floating)
            if id(array) not in pieces and fits and not _is_packed(name, arrays):
                arrays[name] = array.astype(mlx_dtype(cast))
    order = {name: n for n, name in enumerate(sorted(arrays, key=_layer))}
    described = tensor_infos({name: arrays[name] for name in order})
    specs = {name: Spec(info.dtype, info.shape) for name, info in described.items()}

    def stream(skip: Collection[str]) -> Iterator[tuple[str, mx.array]]:
        parts: dict[int, list[tuple[str, str]]] = {}
        for name, array in arrays.items():
            if id(array) in pieces:
                piece, given = pieces[id(array)]
                parts.setdefault(id(piece), []).append((name, given))
        for name in order:
            if name not in arrays:
                continue
            array = arrays.pop(name)
            if id(array) not in pieces:
                if name in skip:
                    continue
                mx.eval(array)
                yield name, array
                del array
                mx.clear_cache()
                continue
            assert stand_ins.pending is not None
            piece, _ = pieces[id(array)]
            made = parts[id(piece)]
            if all(there in skip for there, _ in made):
                continue
            found = stand_ins.pending.make(piece)
            for there, given in made:
                arrays.pop(there, None)
                if there not in skip:
                    yield there, found.pop(given)
            mx.clear_cache()

    notes: list[str] = []
    if stand_ins.widened:
        notes.append(
            f"{stand_ins.widened:,} weights that a load holds packed are written as floats, since "
            "mlx-lm's own layers cannot hold them: linear layers have no global scale (NVFP4)"
        )
    tensors = read_headers(folder)
    source = Source(
        specs=specs,
        stream=stream,
        save_config=_saver(_as_translated(folder, config), cast, keep_vision=keep_vision),
        kind="mlx",
        form=f"MLX form, {_words(setting, stand_ins.pending)}",
        read=sum(nbytes(info) for name, info in tensors.items() if name not in stand_ins.ignored),
        notes=notes,
    )

    def check(written: Path) -> None:
        try:
            plain = _load_without_hooks(written)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UnsupportedCheckpointError(
                f"{folder}: mlx-lm without the plugin would not load the result "
                f"({type(error).__name__}: {error}), so nothing was written; serve the checkpoint "
                "with the plugin."
            ) from error
        wrong = [path for path, kind in kinds.items() if plain.get(path, kind) != kind]
        if wrong:
            notes.append(
                f"mlx-lm's own {fold(wrong)} does not compute as the model was trained; the plugin "
                "corrects that during a load, and converted tensors cannot, so the outputs will "
                "differ without the plugin"
            )

    source.check = check
    return source


def _words(setting: str, pending: requantize.SanitizedLoad | None) -> str:
    """Return the form of the weights: the setting, or what stays packed, or floats."""
    held = () if pending is None else held_formats(pending.policy)
    return setting if setting != "none" else ", ".join(held) or "floats"


def _layer(name: str) -> tuple[int, int]:
    """Return a sort key by layer; tensors outside layers come first."""
    layer = layer_of(name)
    return (1, layer.number) if layer else (0, 0)


def _is_packed(name: str, arrays: Mapping[str, mx.array]) -> bool:
    """Whether the tensor is part of a packed weight, whose scales keep their dtype."""
    path, _, kind = name.rpartition(".")
    return kind in ("scales", "biases", "global_scale") and f"{path}.weight" in arrays


def _settings(module: Any) -> tuple[Any, ...]:
    """Return a module's class and scalar attributes, which determine its forward pass."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, bool))}
    return type(module), tuple(sorted(plain.items()))


def _load_without_hooks(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Load the folder without the hooks, reading no values; return the modules' settings."""
    import mlx_lm.utils

    patching.revert()
    try:
        model, _ = mlx_lm.utils.load_model(folder, lazy=True)
    finally:
        patching.apply()
    return {path: _settings(module) for path, module in model.named_modules()}


def _refused(folder: Path, error: Exception) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        f"{folder}: mlx-lm does not load this checkpoint ({type(error).__name__}: {error}); "
        "`vllm-moe-compat inspect` describes it."
    )


def _as_translated(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return a load's config with the rotary settings that a forward fix took out for the load."""
    wanted = effective_config(read_config(folder)).config

    def restored(section: dict[str, Any], original: Any) -> dict[str, Any]:
        own = original if isinstance(original, dict) else {}
        return section | {key: own[key] for key in _ROTARY if key in own}

    written = restored(config, wanted)
    if isinstance(text := written.get("text_config"), dict):
        written["text_config"] = restored(text, wanted.get("text_config"))
    return written


_ROTARY = ("rope_scaling", "rope_parameters")


def _saver(config: dict[str, Any], cast: str, *, keep_vision: bool) -> Callable[[Path], None]:
    """Return a writer of ``config.json`` without the plugin's own entries."""
    import mlx_lm.utils

    written = dict(config)
    sections = [written]
    if isinstance(text := written.get("text_config"), dict):
        written["text_config"] = dict(text)
        sections.append(written["text_config"])
    for section in sections:
        entry = section.get("quantization_config")
        if isinstance(entry, dict) and entry.get("quant_method") == DEQUANTIZED:
            del section["quantization_config"]
        for key in ("dtype", "torch_dtype"):
            if cast and key in section:
                section[key] = cast

    def save(folder: Path) -> None:
        path = folder / "config.json"
        vision = written.get("vision_config")
        mlx_lm.utils.save_config(written, path)
        if keep_vision and vision is not None:  # Before 0.32, it cannot be told to keep it.
            saved = json.loads(path.read_text(encoding="utf-8")) | {"vision_config": vision}
            path.write_text(json.dumps(dict(sorted(saved.items())), indent=4), encoding="utf-8")

    return save
