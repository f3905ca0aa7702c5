"""Sliding windows as the config says.

Many modules ignore ``sliding_window``, or which layers have one. The window is put into the
instance: every layer asks its own cache for its mask, and ``make_cache`` makes the caches that
mlx-lm's own windowed modules use. The masks that the model makes for all of its layers are not
used, and are not made: ``_OwnMasks``.

A rule takes the settings and returns the window of each layer, in tokens, or None for a layer
that sees every token. The rules follow transformers' classes: some have the window in every
layer, some in the layers that ``layer_types`` names. A token sees itself and the
``window - 1`` tokens before it, in both libraries.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

from vllm_moe_compat.families.fixes.fix import ForwardFix, Settings, become, named

Windows: TypeAlias = tuple[int | None, ...]
Rule: TypeAlias = Callable[[Settings], Windows]
Computed: TypeAlias = Callable[[Settings], Windows | None]
SLIDING = "sliding_attention"


@dataclass(frozen=True, slots=True)
class WindowFix(ForwardFix):
    """A ``ForwardFix`` for windows.

    Attributes:
        windows: the rule by which transformers' class computes.
        computed: the rule by which the module computes without the fix.
    """

    windows: Rule = lambda settings: ()
    computed: Computed = lambda settings: ()

    def in_force(self, settings: Settings) -> Windows:
        """Return the window of each layer of a loaded model."""
        if self.needed(settings) is not None:
            return self.windows(settings)
        layers = _number(settings, "num_hidden_layers") or 0
        return self.computed(settings) or (None,) * layers


def in_every_layer(settings: Settings) -> Windows:
    """Return the window for every layer."""
    window, layers = _number(settings, "sliding_window"), _number(settings, "num_hidden_layers")
    return (window,) * (layers or 0)


def by_layer_types(settings: Settings) -> Windows:
    """Return the window for the layers that ``layer_types`` calls sliding."""
    window, kinds = _number(settings, "sliding_window"), settings.get("layer_types")
    if not isinstance(kinds, list):
        return ()
    return tuple(window if kind == SLIDING else None for kind in kinds)


def of_mistral(settings: Settings) -> Windows:
    """Return the windows of Mistral, which Llama's module computes; none for other models.

    transformers takes a Mistral config with ``layer_types`` for Ministral's.
    """
    if settings.get("model_type") not in ("mistral", "ministral", "ministral3"):
        return ()
    return by_layer_types(settings) or in_every_layer(settings)


def of_mixed_layer_types(settings: Settings) -> Windows | None:
    """Return what modules compute that follow ``layer_types`` if it has both kinds."""
    kinds = settings.get("layer_types")
    if not isinstance(kinds, list):
        return ()
    return by_layer_types(settings) if len(set(kinds)) > 1 else None


def sliding_windows(
    windows: Rule, computed: Computed = lambda settings: (), *, grouped: bool = False
) -> WindowFix:
    """Return the fix of a module.

    Args:
        windows: the rule by which transformers' class computes.
        computed: the rule by which the module computes; by default it ignores windows. None for
            settings with which it fails.
        grouped: whether the module adds its mask to scores ``[B, Hkv, G, T, L]`` itself. A mask
            of a batch, ``[B, 1, T, L]``, then gets an axis for G, and is always an array.
    """

    def needed(settings: Settings) -> str | None:
        wanted, have = windows(settings), computed(settings)
        layers, longest = len(wanted), _number(settings, "max_position_embeddings")
        if not wanted or (have is not None and (wanted == have or not any((*wanted, *have)))):
            return None
        if have == () and longest and min(filter(None, wanted)) >= longest:
            return None  # No position is outside the window.
        counted = Counter(window for window in wanted if window).items()
        parts = [f"a window of {w} tokens in {n} of {layers} layers" for w, n in sorted(counted)]
        return ", ".join(parts) or "attention without a window in every layer"

    def apply(model: Any, settings: Settings) -> None:
        put_in(model, windows(settings), grouped=grouped)

    return WindowFix(
        "sliding-window",
        "sliding windows are ignored, or in other layers than the config's",
        ("sliding_window", "layer_types", "use_sliding_window", "max_window_layers"),
        needed,
        apply,
        windows=windows,
        computed=computed,
    )


def put_in(model: Any, windows: Windows, *, grouped: bool = False) -> None:
    """Give each layer of ``model`` its window, and the model the caches for them."""
    for layer, window in zip(model.layers, windows, strict=True):
        become(layer, _windowed_layer)
        layer.own_window, layer.grouped_mask = window, grouped
    become(owner_of_layers(model), _without_masks)
    become(model, _with_windowed_caches)


def owner_of_layers(model: Any) -> Any:
    """Return the module whose ``layers`` are the model's."""
    first = model.layers[0]
    return next(
        part
        for part in model.modules()
        if isinstance(layers := part.get("layers"), list) and layers and layers[0] is first
    )


@cache
def _windowed_layer(layer: type) -> type:
    """Return the class of a layer that asks its own cache for its mask."""
    from mlx_lm.models.base import create_attention_mask

    signature = inspect.signature(layer.__call__)
    _, hidden, *_ = signature.parameters

    class WindowedLayer(layer):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind(self, *args, **kwargs)
            mask = create_attention_mask(
                given.arguments[hidden],
                given.arguments.get("cache"),
                window_size=self.own_window,
                return_array=self.grouped_mask,
            )
            if self.grouped_mask and mask is not None and mask.ndim == 4:
                mask = mask[:, :, None]
            given.arguments["mask"] = mask
            return super().__call__(*given.args[1:], **given.kwargs)

    return named(WindowedLayer, layer)


@cache
def _without_masks(model: type) -> type:
    """Return the class of a stack of layers that makes no masks."""
    signature = inspect.signature(model.__call__)

    class Unmasked(model):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind(self, *args, **kwargs)
            caches = given.arguments.get("cache")
            given.arguments["cache"] = _OwnMasks(caches or [None] * len(self.layers))
            return super().__call__(*given.args[1:], **given.kwargs)

    return named(Unmasked, model)


@cache
def _with_windowed_caches(model: type) -> type:
    """Return the class of a model whose caches have the windows of its layers."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache

    class WithWindowedCaches(model):  # type: ignore[misc]
        def make_cache(self) -> list[Any]:
            windows = [layer.own_window for layer in self.layers]
            return [KVCache() if w is None else RotatingKVCache(max_size=w) for w in windows]

    return named(WithWindowedCaches, model)


class _OwnMasks(list[Any]):
    """The caches of a pass: one per layer in a loop, without a mask by their number.

    Models loop over layers and caches, and make the masks of all layers from single caches
    before: ``cache[0]``, or the last one of a period that the model may not have. Layers that
    make their own masks have no use for those.
    """

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return super().__getitem__(index)
        return _NoMask(super().__getitem__(index) if -len(self) <= index < len(self) else None)


class _NoMask:
    """A cache, or None for none, that makes no mask."""

    def __init__(self, cache: Any) -> None:
        self.__dict__["cache"] = cache

    def make_mask(self, *args: Any, **kwargs: Any) -> None:
        """Make no mask."""

    @property
    def offset(self) -> Any:
        """The number of tokens in the cache."""
        return 0 if self.cache is None else self.cache.offset

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["cache"], name, value)


def _number(settings: Settings, key: str) -> int | None:
    value = settings.get(key)
    return value if isinstance(value, int) and value > 0 else None


EVERY_LAYER = sliding_windows(in_every_layer)
LAYER_TYPES = sliding_windows(by_layer_types)
GEMMA_2 = sliding_windows(by_layer_types, grouped=True)
MISTRAL = sliding_windows(of_mistral, of_mixed_layer_types)
MIXED = sliding_windows(by_layer_types, of_mixed_layer_types)
"""For modules that follow ``layer_types``, and fail if all layers are of one kind."""
