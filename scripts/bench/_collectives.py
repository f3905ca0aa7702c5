"""Count the exchanges between ranks, and compute what they would take on three links.

The passes of two published shapes are built and not evaluated, with MLX's collectives replaced by
counters, so calls and bytes are those that a rank makes. The links are assumptions: a latency per
message and a bandwidth. A sum over a ring of N ranks is 2 (N - 1) messages of an Nth of the bytes
one after the other, a gather N - 1 of all bytes.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import mlx.core as mx

from vllm_moe_compat.ranks import pipeline
from vllm_moe_compat.ranks.group import RankOf
from vllm_moe_compat.ranks.shard import shard

QWEN = {
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
}
MODELS = {
    "Qwen3-30B-A3B": {
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
    },
    "Qwen3-235B-A22B": {
        "hidden_size": 4096,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
    },
}
# Name → microseconds per message, bytes per microsecond. Assumed, not measured.
LINKS = {
    "10 GbE (50 us, 1.1 GB/s)": (50.0, 1100.0),
    "Thunderbolt 5, TCP (40 us, 5 GB/s)": (40.0, 5000.0),
    "Thunderbolt 5, RDMA (8 us, 7 GB/s)": (8.0, 7000.0),
}
PASSES = {"decode, 1 token": 1, "decode, 16 rows": 16, "prefill, 2,048 tokens": 2048}


@dataclass
class Counter:
    """Collectives of one pass: kind → bytes of each call. It is a pipeline's transport, too."""

    calls: dict[str, list[int]] = field(default_factory=dict)

    def note(self, kind: str, array: mx.array) -> mx.array:
        """Count a call; return its array."""
        self.calls.setdefault(kind, []).append(array.nbytes)
        return array

    def receive(self, like: mx.array) -> mx.array:
        """Not counted: the rank before sends it."""
        return like

    def give(self, result: mx.array) -> mx.array:
        """Count what goes to the next rank."""
        return self.note("send", result)

    def tell(self, result: mx.array) -> mx.array:
        """Count what goes to all ranks."""
        return self.note("gather", result)

    def microseconds(self, ranks: int, latency: float, bandwidth: float) -> float:
        """Return the time of all calls one after the other."""
        total = 0.0
        for kind, sizes in self.calls.items():
            for size in sizes:
                if kind == "send" or kind == "gather":
                    total += (ranks - 1) * (latency + size / bandwidth)
                else:
                    total += 2 * (ranks - 1) * (latency + size / ranks / bandwidth)
        return total


@contextmanager
def counting(counter: Counter) -> Iterator[None]:
    """Count MLX's collectives instead of running them."""
    with ExitStack() as stack:

        def sums(array: mx.array, **_: Any) -> mx.array:
            return counter.note("sum", array)

        stack.enter_context(mock.patch.object(mx.distributed, "all_sum", sums))
        yield


def model(name: str) -> Any:
    """A model without values: nothing of it is evaluated."""
    module = importlib.import_module("mlx_lm.models.qwen3_moe")
    made = module.Model(module.ModelArgs.from_dict(QWEN | MODELS[name]))
    made.set_dtype(mx.bfloat16)
    return made


def count(name: str, kind: str, ranks: int, tokens: int) -> Counter:
    """Count the exchanges of one pass."""
    counter, made = Counter(), model(name)
    if kind == "tensor":
        shard(made, RankOf(0, ranks))
    else:
        pipeline.keep_range(made, 0, len(made.layers) // ranks, counter)
    shape = (tokens, 1) if tokens <= 16 else (1, tokens)
    with counting(counter):
        made(mx.zeros(shape, dtype=mx.int32))
        if tokens <= 16:
            mx.distributed.all_sum(mx.zeros((tokens,), dtype=mx.int32))
        else:
            # A prompt's last result is needed for one token only, in the decode pass.
            counter.calls.pop("gather", None)
    return counter


def main() -> None:
    """Print one table per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    ranks = parser.parse_args().ranks
    for name in MODELS:
        print(f"{name}, bfloat16, {ranks} ranks\n")
        print(f"| pass | option | calls | KiB told | {' | '.join(LINKS)} |")
        print("|---" * (4 + len(LINKS)) + "|")
        for words, tokens in PASSES.items():
            for kind in ("tensor", "pipeline"):
                found = count(name, kind, ranks, tokens)
                sizes = [size for each in found.calls.values() for size in each]
                times = [found.microseconds(ranks, *link) / 1000 for link in LINKS.values()]
                cells = [words, f"{kind}-parallel", f"{len(sizes):,}", f"{sum(sizes) / 1024:,.1f}"]
                print(f"| {' | '.join(cells + [f'{time:.2f} ms' for time in times])} |")
        print()


if __name__ == "__main__":
    main()
