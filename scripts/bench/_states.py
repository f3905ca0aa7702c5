"""CPU seconds of a pass over T tokens that keeps the states after each of them.

Random hybrid models of mlx-lm, on mlx-lm's own caches, after a short prompt. Three ways take
turns: T passes of one token, one pass that keeps the last states only, and one recorded pass of
which some states are gathered (``StateRecording``). Ratios are taken within a round; the control
is the ratio of two turns of the same way, 1 on a quiet machine.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

PROMPT = 8
VOCAB = 1024
COMMON = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 8,
    "num_experts_per_tok": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}


def models(hidden: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return kind of state → (mlx-lm's module, its config)."""
    common = COMMON | {"hidden_size": hidden, "intermediate_size": hidden}
    delta = {
        "num_experts": 16,
        "moe_intermediate_size": hidden // 2,
        "head_dim": 64,
        "linear_num_value_heads": 8,
        "linear_num_key_heads": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": hidden // 2,
        "mlp_only_layers": [],
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "norm_topk_prob": True,
    }
    mamba = {
        "num_local_experts": 16,
        "shared_intermediate_size": hidden // 2,
        "attention_bias": False,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 0.125,
        "logits_scaling": 1.0,
        "residual_multiplier": 0.5,
        "layer_types": (["mamba"] * 3 + ["attention"]) * 2,
        "position_embedding_type": "nope",
        "rope_theta": 10000.0,
        "mamba_n_heads": hidden // 32,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
        "mamba_proj_bias": False,
        "mamba_conv_bias": True,
    }
    return {
        "gated delta": ("qwen3_next", common | delta),
        "Mamba-2": ("granitemoehybrid", common | mamba),
    }


def build(module: str, config: dict[str, Any]) -> Any:
    """Make a model with random weights."""
    import mlx.core as mx

    code = importlib.import_module(f"mlx_lm.models.{module}")
    mx.random.seed(0)
    model = code.Model(code.ModelArgs.from_dict(config | {"model_type": module}))
    mx.eval(model.parameters())
    return model


class Case:
    """The ways to compute T tokens of B rows."""

    def __init__(self, model: Any, rows: int, tokens: int) -> None:
        import mlx.core as mx

        from vllm_moe_compat.backend.model.state_recording import StateRecording

        self.model, self.recording = model, StateRecording(model)
        draw = np.random.default_rng(0)
        self.prompt = mx.array(draw.integers(0, VOCAB, (rows, PROMPT)))
        self.tokens = mx.array(draw.integers(0, VOCAB, (rows, tokens)))
        # Rows keep different numbers of tokens.
        self.counts = [1 + row % tokens for row in range(rows)]

    def _begun(self) -> list[Any]:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        caches = make_prompt_cache(self.model)
        mx.eval(self.model(self.prompt, cache=caches), [cache.state[0] for cache in caches])
        return caches

    def one_by_one(self) -> float:
        """T passes of one token."""
        import mlx.core as mx

        caches = self._begun()
        begin = time.process_time()
        for token in range(self.tokens.shape[1]):
            logits = self.model(self.tokens[:, token : token + 1], cache=caches)
            mx.eval(logits, [cache.state[0] for cache in caches])
        return time.process_time() - begin

    def unrecorded(self) -> float:
        """One pass that keeps the last states only."""
        import mlx.core as mx

        caches = self._begun()
        begin = time.process_time()
        mx.eval(self.model(self.tokens, cache=caches), [cache.state[0] for cache in caches])
        return time.process_time() - begin

    def recorded(self) -> float:
        """One recorded pass, and the gathering of states."""
        import mlx.core as mx
        from mlx_lm.models.cache import ArraysCache

        caches = self._begun()
        begin = time.process_time()
        stateful = [cache for cache in caches if isinstance(cache, ArraysCache)]
        lengths = np.full(len(self.counts), self.tokens.shape[1])
        others = self.recording.caches([tuple(cache.cache) for cache in stateful], lengths)
        instead = iter(others)
        given = [next(instead) if isinstance(cache, ArraysCache) else cache for cache in caches]
        with self.recording.during():
            logits = self.model(self.tokens, cache=given)
        states = self.recording.by_position(others)
        mx.eval(logits, [layer.held for layer in states])
        mx.eval([layer.after(range(len(self.counts)), self.counts) for layer in states])
        return time.process_time() - begin


def measure(kind: str, model: Any, rows: int, tokens: int, rounds: int) -> dict[str, Any]:
    """One model, number of rows and number of tokens: ratios of CPU seconds."""
    case = Case(model, rows, tokens)
    ways: list[Callable[[], float]] = [case.one_by_one, case.unrecorded, case.recorded]
    for way in ways:
        way()
    times = [[way() for way in [*ways, case.recorded]] for _ in range(rounds)]

    def ratio(pairs: list[tuple[float, float]]) -> float:
        return round(statistics.median(a / b for a, b in pairs), 3)

    return {
        "states": kind,
        "rows": rows,
        "tokens": tokens,
        "to_one_by_one": ratio([(r, one) for one, _, r, _ in times]),
        "to_unrecorded": ratio([(r, u) for _, u, r, _ in times]),
        "control": ratio([(again, r) for _, _, r, again in times]),
    }


def table(cases: list[dict[str, Any]]) -> str:
    lines = [
        "| states | rows | tokens | to passes of one token | to an unrecorded pass | control |",
        "|---|---|---|---|---|---|",
    ]
    for row in cases:
        lines.append(
            f"| {row['states']} | {row['rows']} | {row['tokens']} | {row['to_one_by_one']:.2f} | "
            f"{row['to_unrecorded']:.2f} | {row['control']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,4", help="rows of a pass (default 1,4)")
    parser.add_argument("--tokens", default="2,4", help="tokens of a pass (default 2,4)")
    parser.add_argument("--hidden", type=int, default=512, help="width (default 512)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds per case (default 9)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    cases = []
    for kind, (module, config) in models(args.hidden).items():
        model = build(module, config)
        cases += [
            measure(kind, model, int(rows), int(tokens), args.rounds)
            for rows in args.rows.split(",")
            for tokens in args.tokens.split(",")
        ]
    print(json.dumps({"cases": cases}) if args.json else table(cases))


if __name__ == "__main__":
    main()
