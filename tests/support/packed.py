"""Packed integers as their authors write them, and the values that they stand for.

Everything here is numpy and the published definitions; nothing is taken from the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

State = dict[str, torch.Tensor]
AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Ints:
    """Unsigned integers ``[O, I]``, their scales and zero points ``[O, G]``, groups ``[I]``."""

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    order: np.ndarray
    bits: int

    @property
    def values(self) -> np.ndarray:
        """``(q - zero)·scale`` in float32."""
        scale = self.scale.astype(np.float32)[:, self.order]
        return (self.q - self.zero[:, self.order]).astype(np.float32) * scale


def random_ints(
    generator: np.random.Generator,
    rows: int,
    columns: int,
    bits: int,
    group: int,
    *,
    symmetric: bool = True,
    act_order: bool = False,
    dtype: Any = np.float16,
) -> Ints:
    """Draw integers; values have a spread near ``1 / sqrt(columns)``."""
    groups = -(-columns // group)
    q = generator.integers(0, 2**bits, (rows, columns))
    spread = columns**-0.5 / 2 ** (bits - 1)
    scale = (spread * generator.uniform(0.5, 2.0, (rows, groups))).astype(dtype)
    middle = 2 ** (bits - 1)
    zero = np.full((rows, groups), middle)
    if not symmetric:
        low, high = max(1, middle - middle // 2), middle + middle // 2
        zero = generator.integers(low, high, (rows, groups))
    order = np.arange(columns) // group
    if act_order:
        order = generator.permutation(order)
    return Ints(q, scale, zero, order, bits)


def words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Pack the last axis as a stream of bits, the lowest first, into int32."""
    *lead, count = numbers.shape
    stream = (numbers[..., None] >> np.arange(bits)) & 1
    stream = stream.reshape(*lead, count * bits)
    padded = np.zeros((*lead, -(-count * bits // 32) * 32), np.uint8)
    padded[..., : count * bits] = stream
    packed = np.packbits(padded, axis=-1, bitorder="little")
    return packed.view("<u4").view(np.int32)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


@dataclass(frozen=True)
class PackedForm:
    """A published form with its settings.

    ``store`` returns the tensors of one weight ``….weight``; ``config`` is
    ``quantization_config``.
    """

    name: str
    bits: int
    group: int  # 0: one scale per row
    store: Callable[[str, Ints], State]
    config: dict[str, Any] = field(default_factory=dict)
    symmetric: bool = True
    act_order: bool = False
    dtype: Any = np.float16

    def draw(self, generator: np.random.Generator, rows: int, columns: int) -> Ints:
        return random_ints(
            generator,
            rows,
            columns,
            self.bits,
            self.group or columns,
            symmetric=self.symmetric,
            act_order=self.act_order,
            dtype=self.dtype,
        )


def pack_quantized(name: str, ints: Ints, zeros: bool = False, order: bool = False) -> State:
    found = {
        f"{name}_packed": tensor(words(ints.q, ints.bits)),
        f"{name}_scale": tensor(ints.scale),
        f"{name}_shape": torch.tensor(ints.q.shape),
    }
    if zeros:
        found[f"{name}_zero_point"] = tensor(words(ints.zero.T, ints.bits).T)
    if order:
        found[f"{name}_g_idx"] = tensor(ints.order.astype(np.int32))
    return found


def int_quantized(name: str, ints: Ints, zeros: bool = False) -> State:
    found = {
        name: tensor((ints.q - 128).astype(np.int8)),
        f"{name}_scale": tensor(ints.scale),
    }
    if zeros:
        found[f"{name}_zero_point"] = tensor((ints.zero - 128).astype(np.int8))
    return found


def gptq(name: str, ints: Ints, v2: bool = False, order: bool = True) -> State:
    base = name.removesuffix("weight")
    zero = ints.zero if v2 else (ints.zero - 1) % 2**ints.bits
    found = {
        f"{base}qweight": tensor(words(ints.q, ints.bits).T),
        f"{base}qzeros": tensor(words(zero.T, ints.bits)),
        f"{base}scales": tensor(ints.scale.T),
    }
    if order:
        found[f"{base}g_idx"] = tensor(ints.order.astype(np.int32))
    return found


def awq(name: str, ints: Ints) -> State:
    base = name.removesuffix("weight")

    def pack(numbers: np.ndarray) -> torch.Tensor:
        rows = numbers.reshape(*numbers.shape[:-1], -1, 8)[..., list(AWQ_NIBBLES)]
        return tensor(words(rows.reshape(numbers.shape), 4))

    return {
        f"{base}qweight": pack(ints.q.T),
        f"{base}qzeros": pack(ints.zero.T),
        f"{base}scales": tensor(ints.scale.T),
    }


def _ct(
    form: str, bits: int, group: int, symmetric: bool = True, order: bool = False
) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "symmetric": symmetric,
        "actorder": "group" if order else None,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def pack_form(
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    order: bool = False,
    dtype: Any = np.float16,
) -> PackedForm:
    words_ = f"int{bits} g{group or 'row'}{'' if symmetric else ' asym'}{' act' if order else ''}"
    return PackedForm(
        f"pack-quantized {words_}",
        bits,
        group,
        lambda name, ints: pack_quantized(name, ints, not symmetric, order),
        _ct("pack-quantized", bits, group, symmetric, order),
        symmetric,
        order,
        dtype,
    )


def int_form(group: int = 0, symmetric: bool = True, kind: str = "int-quantized") -> PackedForm:
    name = f"{kind} g{group or 'row'}{'' if symmetric else ' asym'}"
    return PackedForm(
        name,
        8,
        group,
        lambda name, ints: int_quantized(name, ints, not symmetric),
        _ct(kind, 8, group, symmetric),
        symmetric,
    )


def gptq_form(
    bits: int = 4,
    group: int = 32,
    symmetric: bool = False,
    order: bool = False,
    v2: bool = False,
) -> PackedForm:
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group or -1,
        "sym": symmetric,
        "desc_act": order,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }
    name = (
        f"GPTQ{' v2' if v2 else ''} int{bits} g{group or 'row'}"
        f"{' sym' if symmetric else ''}{' act' if order else ''}"
    )
    return PackedForm(
        name,
        bits,
        group,
        lambda name, ints: gptq(name, ints, v2),
        config,
        symmetric,
        order,
    )


def awq_form(group: int = 32) -> PackedForm:
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
    }
    return PackedForm(f"AWQ g{group}", 4, group, awq, config, False)


def auto_round_form(packing: str, bits: int = 4, group: int = 32) -> PackedForm:
    config = {
        "quant_method": "auto-round",
        "bits": bits,
        "group_size": group,
        "sym": packing == "gptq",
        "packing_format": f"auto_round:auto_{packing}",
        "extra_config": {},
    }

    def store(name: str, ints: Ints) -> State:
        return awq(name, ints) if packing == "awq" else gptq(name, ints, order=False)

    return PackedForm(
        f"AutoRound {packing} int{bits} g{group}", bits, group, store, config, packing == "gptq"
    )
