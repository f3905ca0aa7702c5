"""An experiment: block-FP8 experts multiplied without dequantising or rounding them.

``mx.gather_qmm`` knows E4M3 values, as ``mxfp8``, whose scales are powers of two for
32 values each: too coarse for a float scale per 128x128 block. But a scale is constant
over 128 columns, so it can be taken out of the sum. With unit exponents,

    y[o] = sum over k of s[o // 128, k] * (sum over i in block k of q[o, i] x[i])

the inner sums are one ``gather_qmm`` over ``[E * K/128, O, 128]``, the checkpoint's bytes
rearranged, and the outer one is a small weighted sum. It is compared with the 8-bit
experts that ``VLLM_MOE_COMPAT_QUANTIZE=8bit`` gives and with mxfp8: bytes, error
against float64, and time for one token and for a prompt. Turns are interleaved.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

BLOCK, TOP_K = 128, 8


class Split:
    """The K-split: bytes unchanged, exact."""

    def __init__(self, packed: mx.array, scale: mx.array) -> None:
        experts, rows, columns = packed.shape
        self.blocks = columns // BLOCK
        parts = packed.reshape(experts, rows, self.blocks, BLOCK).swapaxes(1, 2)
        parts = mx.contiguous(parts).reshape(experts * self.blocks, rows, BLOCK)
        self.weight = parts.view(mx.uint32)
        # E8M0: the byte 127 is two to the power of zero.
        self.ones = mx.full((experts * self.blocks, rows, BLOCK // 32), 127, dtype=mx.uint8)
        # [E, K, O]: a factor per row of each partial sum.
        self.scale = mx.repeat(scale.swapaxes(1, 2), BLOCK, axis=2)
        self.compact = scale
        mx.eval(self.weight, self.ones, self.scale)

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        """``[n, I]`` and ``[n, k]`` give ``[n, k, O]``."""
        tokens = x.shape[0]
        split = x.reshape(tokens, 1, self.blocks, 1, BLOCK)
        index = chosen[..., None] * self.blocks + mx.arange(self.blocks)
        sums = mx.gather_qmm(
            mx.broadcast_to(split, (tokens, chosen.shape[1], self.blocks, 1, BLOCK)),
            self.weight,
            self.ones,
            rhs_indices=index,
            transpose=True,
            group_size=32,
            bits=8,
            mode="mxfp8",
        )[..., 0, :]
        return (sums * self.scale[chosen]).sum(axis=2)

    @property
    def nbytes(self) -> int:
        """What has to be held; the scales one per block, as in the checkpoint."""
        return int(self.weight.nbytes + self.ones.nbytes + self.compact.nbytes)


class Packed:
    """Stock experts in one of MLX's formats."""

    def __init__(self, weight: mx.array, mode: str, group: int, bits: int = 8) -> None:
        self.kind = {"mode": mode, "group_size": group, "bits": bits}
        self.parts = mx.quantize(weight, **self.kind)
        mx.eval(self.parts)

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        """``[n, I]`` and ``[n, k]`` give ``[n, k, O]``."""
        return mx.gather_qmm(
            x[:, None, None, :], *self.parts, rhs_indices=chosen, transpose=True, **self.kind
        )[..., 0, :]

    @property
    def nbytes(self) -> int:
        return sum(int(part.nbytes) for part in self.parts)


class Float:
    """Experts in float32, as the CPU serves them without quantising."""

    def __init__(self, weight: mx.array) -> None:
        self.weight = weight
        mx.eval(weight)

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        """``[n, I]`` and ``[n, k]`` give ``[n, k, O]``."""
        turned = self.weight.swapaxes(-1, -2)
        return mx.gather_mm(x[:, None, None, :], turned, rhs_indices=chosen)[..., 0, :]

    @property
    def nbytes(self) -> int:
        return int(self.weight.nbytes)


def seconds(way: Callable[..., mx.array], given: tuple[mx.array, ...], least: float) -> float:
    """Time of one evaluation, over enough of them."""
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < least or not count:
        mx.eval(way(*given))
        count += 1
    return spent / count


def run(args: argparse.Namespace) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    shape = (args.experts, args.rows, args.columns)
    values = draw.standard_normal(shape, dtype=np.float32)
    packed = mx.to_fp8(mx.array((values * 100).clip(-448, 448)))
    grid = (args.experts, args.rows // BLOCK, args.columns // BLOCK)
    scale = mx.array(draw.uniform(1e-4, 1e-3, grid).astype(np.float32))
    wide = mx.repeat(mx.repeat(scale, BLOCK, axis=1), BLOCK, axis=2)
    exact = mx.from_fp8(packed, dtype=mx.float32) * wide
    rounded = exact.astype(mx.bfloat16)
    ways: dict[str, Any] = {
        "fp8 split": Split(packed, scale),
        "8bit": Packed(rounded, "affine", 64),
        "mxfp8": Packed(rounded, "mxfp8", 32),
        "float32": Float(exact),
    }
    truth = np.array(exact).astype(np.float64)
    count = exact.size
    result: dict[str, Any] = {
        name: {"bits_per_weight": round(way.nbytes * 8 / count, 3)} for name, way in ways.items()
    }
    for tokens in (1, args.tokens):
        x = draw.standard_normal((tokens, args.columns)).astype(np.float32)
        chosen = np.stack(
            [draw.choice(args.experts, TOP_K, replace=False) for _ in range(tokens)]
        ).astype(np.uint32)
        wanted = np.einsum("nkoi,ni->nko", truth[chosen[:4]], x[:4].astype(np.float64))
        x_mx, chosen_mx = mx.array(x), mx.array(chosen)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(args.rounds):
            for name in list(ways) if number % 2 == 0 else list(ways)[::-1]:
                times[name].append(seconds(ways[name], (x_mx, chosen_mx), args.seconds))
        for name, way in ways.items():
            found = np.array(way(x_mx, chosen_mx)[:4].astype(mx.float32))
            error = np.sqrt(((found - wanted) ** 2).mean() / (wanted**2).mean())
            result[name][f"ms_{tokens}"] = round(statistics.median(times[name]) * 1e3, 3)
            result[name][f"error_{tokens}"] = float(f"{error:.2e}")
    return {"ways": result, "tokens": [1, args.tokens], "shape": list(shape)}


def table(result: dict[str, Any]) -> str:
    one, many = result["tokens"]
    lines = [
        f"| | bits/weight | error | ms, {one} token | ms, {many} tokens |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["ways"].items():
        lines.append(
            f"| {name} | {row['bits_per_weight']:.2f} | {row[f'error_{one}']:.1e} | "
            f"{row[f'ms_{one}']:.2f} | {row[f'ms_{many}']:.1f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench/fp8_split", description=__doc__)
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("--experts", type=int, default=64)
    add("--rows", type=int, default=512, help="output rows O, a multiple of 128")
    add("--columns", type=int, default=2048, help="input columns I, a multiple of 128")
    add("--tokens", type=int, default=64, help="length of the prompt (default 64)")
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=0.3, help="length of a turn")
    args = parser.parse_args()
    from _serve import machine

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    result = run(args) | {"machine": machine()}
    out.write((json.dumps(result) if args.json else table(result)) + "\n")
    out.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
