"""The memory that one sequence keeps, by the config: bytes per 1,000 tokens.

Keys and values of softmax attention grow with the sequence, those of a sliding window up
to the window. Latent attention (MLA) keeps one compressed vector and the rotary part of
the key per token. Linear attention keeps a state of fixed size. Values take two bytes, as
in bfloat16. The config is untrusted: an invalid number makes the result "not known".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_moe_compat.checkpoint.config import sections
from vllm_moe_compat.commands.inspect.model import CacheKind
from vllm_moe_compat.commands.inspect.problems import clean
from vllm_moe_compat.families.row import Cache

TOKENS = 1000
_WIDTH = 2
_STATE_WIDTH = 4
_MOST = 2**24
_FULL, _WINDOWED, _LINEAR, _MAMBA = (
    "full_attention",
    "sliding_attention",
    "linear_attention",
    "mamba",
)
_ALL_KEPT = {"attention", "chunked_attention", "indexed_attention"}
"""Further kinds of softmax attention; mlx-lm keeps every token of them."""


class _UnknownError(Exception):
    """The config does not determine the cache; the argument is the reason."""


def cache(
    config: Mapping[str, Any], facts: Cache, windows: Sequence[int | None] = ()
) -> tuple[list[CacheKind], str]:
    """Compute the cache of one sequence, by kind of layer.

    Args:
        config: the config translated for mlx-lm.
        facts: what the module's cache holds beyond what the config says.
        windows: the window of each layer; if empty, the config tells.

    Returns:
        The kinds, the most frequent first, and the assumption made; if the config does not
        determine the cache, no kinds and the reason.
    """
    try:
        return _cache(_Numbers(config), facts, windows), "2 bytes a number"
    except _UnknownError as error:
        return [], f"not known: {error}"


class _Numbers:
    """Typed access to the numbers of an untrusted config."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._sections = sections(config)

    def value(self, key: str) -> Any:
        return next((s[key] for s in self._sections if s.get(key) is not None), None)

    def maybe(self, *keys: str) -> int | None:
        for key in keys:
            value = self.value(key)
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST:
                return value
            if value is not None and value != 0:
                raise _UnknownError(f"{key} is no number of use")
        return None

    def need(self, *keys: str) -> int:
        value = self.maybe(*keys)
        if value is None:
            raise _UnknownError(f"the config has no {' or '.join(keys)}")
        return value

    def kinds(self, key: str) -> list[str] | None:
        value = self.value(key)
        if isinstance(value, list) and value and all(isinstance(kind, str) for kind in value):
            return value
        return None


def _cache(numbers: _Numbers, facts: Cache, windows: Sequence[int | None]) -> list[CacheKind]:
    if numbers.maybe("num_kv_shared_layers"):
        raise _UnknownError("some layers share their keys and values")
    if windows:
        sizes = Counter(windows).most_common()
        return [_softmax(numbers, count, window) for window, count in sizes]
    counts = _kinds(numbers)
    for kind in _ALL_KEPT & counts.keys():
        counts[_FULL] += counts.pop(kind)
    counts[_FULL] *= facts.attentions
    return [_one(numbers, kind, count, facts) for kind, count in counts.most_common() if count]


def _kinds(numbers: _Numbers) -> Counter[str]:
    """Count the layers of each kind; families describe them in different keys."""
    pattern = numbers.value("hybrid_override_pattern")
    if isinstance(pattern, str):
        return Counter({_FULL: pattern.count("*"), _MAMBA: pattern.count("M")})
    if (blocks := numbers.kinds("layers_block_type")) is not None:
        full = sum(kind in (_FULL, "attention") for kind in blocks)
        return Counter({_FULL: full, _MAMBA: sum(k in (_LINEAR, _MAMBA) for k in blocks)})
    layers = numbers.need("num_hidden_layers", "num_layers")
    if (kinds := numbers.kinds("layer_types")) is not None:
        return Counter(kinds[:layers])
    linear = numbers.value("linear_attn_config")
    if isinstance(linear, dict) and isinstance(whole := linear.get("full_attn_layers"), list):
        return _split(layers, len(whole), _LINEAR)
    if numbers.maybe("linear_num_value_heads") is not None:
        return _split(layers, layers // numbers.need("full_attention_interval"), _LINEAR)
    if (period := numbers.maybe("attn_layer_period")) is not None:
        first = numbers.maybe("attn_layer_offset") or 0
        return _split(layers, len(range(first, layers, period)), _MAMBA)
    if numbers.maybe("sliding_window") and (every := numbers.maybe("sliding_window_pattern")):
        return _split(layers, layers // every, _WINDOWED)
    if numbers.maybe("mamba_d_ssm") is not None:  # both in every layer
        return Counter({_FULL: layers, _MAMBA: layers})
    return Counter({_FULL: layers})


def _split(layers: int, full: int, other: str) -> Counter[str]:
    return Counter({_FULL: full, other: max(0, layers - full)})


def _one(numbers: _Numbers, kind: str, count: int, facts: Cache) -> CacheKind:
    if kind == _FULL:
        rank = numbers.maybe("kv_lora_rank")
        if rank is not None and not facts.expands_latent:
            row = rank + numbers.need("qk_rope_head_dim")
            row += 2 * (numbers.maybe("index_head_dim") or 0)  # as keys and as values
            return CacheKind("latent", count, count * row * _WIDTH * TOKENS)
        return _softmax(numbers, count, None)
    if kind == _WINDOWED:
        return _softmax(numbers, count, numbers.need("sliding_window", "sliding_window_size"))
    state = {_LINEAR: _delta, _MAMBA: _mamba, "conv": _conv}.get(kind)
    size = state(numbers) if state is not None else None
    if size is None:
        return CacheKind(clean(kind, 60), count, None)
    return CacheKind(kind, count, 0, state_bytes=count * size)


def _softmax(numbers: _Numbers, count: int, window: int | None) -> CacheKind:
    if window is None:
        return CacheKind("softmax", count, count * _token(numbers, "global_") * TOKENS)
    size = count * _token(numbers, "swa_") * min(TOKENS, window)
    return CacheKind("window", count, size, window)


def _delta(numbers: _Numbers) -> int | None:
    """Return the state of one gated delta layer; the recurrence is kept in float32."""
    kimi = numbers.value("linear_attn_config")
    if isinstance(kimi, dict):
        inner = _Numbers(kimi)
        sides = inner.need("num_heads") * inner.need("head_dim")
        tail = inner.need("short_conv_kernel_size") - 1
        return tail * 3 * sides * _WIDTH + sides * inner.need("head_dim") * _STATE_WIDTH
    if numbers.maybe("linear_num_value_heads") is None:
        return None
    width = numbers.need("linear_key_head_dim")
    keys = numbers.need("linear_num_key_heads") * width
    values = numbers.need("linear_num_value_heads") * numbers.need("linear_value_head_dim")
    tail = numbers.need("linear_conv_kernel_dim") - 1
    return tail * (2 * keys + values) * _WIDTH + values * width * _STATE_WIDTH


def _mamba(numbers: _Numbers) -> int | None:
    """Return the state of one Mamba layer; that of Mamba 2 is kept in float32."""
    heads = numbers.maybe("mamba_n_heads", "mamba_num_heads")
    if heads is None:
        if numbers.maybe("mamba_expand") is None:
            return None
        inner = numbers.need("mamba_expand") * numbers.need("hidden_size")
        return inner * (numbers.need("mamba_d_conv") - 1 + numbers.need("mamba_d_state")) * _WIDTH
    inner = heads * numbers.need("mamba_d_head", "mamba_head_dim")
    width = numbers.need("mamba_d_state", "ssm_state_size")
    groups = numbers.need("mamba_n_groups", "n_groups")
    tail = numbers.need("mamba_d_conv", "conv_kernel") - 1
    return tail * (inner + 2 * groups * width) * _WIDTH + inner * width * _STATE_WIDTH


def _conv(numbers: _Numbers) -> int:
    """Return the tail of one short convolution."""
    return (numbers.need("conv_L_cache") - 1) * numbers.need("hidden_size") * _WIDTH


def _token(numbers: _Numbers, own: str) -> int:
    """Return the bytes of one token's keys and values in one layer.

    Args:
        numbers: the config's numbers.
        own: prefix of keys that apply to this kind of layer only.
    """
    heads = numbers.need("num_attention_heads")
    if numbers.maybe("kv_lora_rank") is not None:
        width = numbers.need("qk_nope_head_dim") + numbers.need("qk_rope_head_dim")
    else:
        head_width = numbers.maybe(f"{own}head_dim", "head_dim")
        width = head_width or numbers.need("hidden_size") // heads
    values = numbers.maybe(f"{own}v_head_dim", "v_head_dim") or width
    pairs = numbers.maybe(
        f"{own}num_key_value_heads", f"num_{own}key_value_heads", "num_key_value_heads"
    )
    return (pairs or heads) * (width + values) * _WIDTH
