"""Decode tokens/s of packed weights over mlx-lm's own checkpoint of the same numbers.

A small Qwen3 MoE with random weights is written in a published form and loaded through the
hooks. mlx-lm's ``save_model`` and ``save_config`` write that load, and mlx-lm alone loads it
again. Both models decode greedily with mlx-lm's ``generate_step`` in one process and take turns:
a round is mlx-lm, ours, mlx-lm. The ratio is the median over rounds of ours to the mean of its
two neighbours; the control is the median ratio of those two to each other, 1 on a quiet machine.
CPU seconds vary less than wall time where other work shares the cores.

In int4, GPTQ and AWQ the experts are packed and the rest is floats. In NVFP4 the attention is
packed too, so that its linear layers multiply by a global scale, and the experts by theirs.
mlx-lm alone cannot load those linear layers; its side has the same bytes without the global
scales. These are 1 in the checkpoint, so both sides compute the same numbers and the ratio is
the price of the multiplication.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _forms import FORMS, Form

PACKED = ("int4", "gptq", "awq", "nvfp4")
DTYPES = ("float32", "bfloat16")
PROMPT = 2


class Seconds(NamedTuple):
    """CPU seconds of the process, and wall time."""

    cpu: float
    wall: float


def config(args: argparse.Namespace, form: Form) -> dict[str, Any]:
    """The config.json of the release."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "intermediate_size": args.hidden,
        "moe_intermediate_size": args.hidden // 2,
        "num_experts": args.experts,
        "num_experts_per_tok": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": args.hidden // 256,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "vocab_size": 4096,
        "quantization_config": form.config,
    }


def write(path: Path, args: argparse.Namespace, name: str, dtype: str) -> None:
    """Write the checkpoint in the form, its floats in the dtype."""
    import mlx_lm.utils
    import torch
    from mlx.utils import tree_flatten
    from safetensors.torch import save_file

    form = FORMS[name]
    settings = config(args, form)
    (path / "config.json").write_text(json.dumps(settings))
    model_class, args_class = mlx_lm.utils._get_classes(settings)
    shapes = tree_flatten(model_class(args_class.from_dict(settings)).parameters())
    draw = np.random.default_rng(0)
    tensors: dict[str, torch.Tensor] = {}
    for key, array in shapes:
        module = key.removesuffix(".weight")
        if "switch_mlp" in key:
            stem, _, projection = module.partition("switch_mlp.")
            for expert in range(args.experts):
                one = f"{stem}experts.{expert}.{projection}"
                tensors |= form.store(draw, one, *array.shape[1:])
        elif name == "nvfp4" and "self_attn" in key and array.ndim == 2:
            tensors |= form.store(draw, module, *array.shape)
        elif array.ndim == 2:
            values = draw.standard_normal(array.shape, dtype=np.float32) * array.shape[1] ** -0.5
            tensors[key] = torch.from_numpy(values).to(getattr(torch, dtype))
        else:
            tensors[key] = torch.ones(array.shape, dtype=getattr(torch, dtype))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def load_both(path: Path, own: Path) -> tuple[Any, Any]:
    """Return the release, loaded through the hooks, and mlx-lm's own load of what it saves."""
    import mlx.core as mx
    import mlx_lm.utils

    import vllm_moe_compat

    with vllm_moe_compat.applied():
        model, settings = mlx_lm.utils.load_model(path)
    mlx_lm.utils.save_model(own, model)
    for entry in settings["quantization"].values():
        if isinstance(entry, dict):
            entry.pop("global_scale", None)
    mlx_lm.utils.save_config(settings, own / "config.json")
    for file in own.glob("*.safetensors"):
        weights = mx.load(str(file))
        kept = {key: value for key, value in weights.items() if "global_scale" not in key}
        if len(kept) < len(weights):
            mx.eval(kept)
            mx.save_safetensors(str(file), kept, metadata={"format": "mlx"})
    theirs, _ = mlx_lm.utils.load_model(own)
    return model, theirs


def classes(model: Any) -> dict[str, int]:
    """How many layers of each class hold packed weights."""
    found: dict[str, int] = {}
    for _, module in model.named_modules():
        if "scales" in module:
            name = type(module).__name__
            found[name] = found.get(name, 0) + 1
    return found


def decode(model: Any, steps: int) -> tuple[Seconds, list[int]]:
    """Seconds for that many tokens after the first, and the tokens."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    prompt = mx.arange(1, PROMPT + 1)
    times, tokens = [], []
    for token, _ in generate_step(prompt, model, max_tokens=steps + 1):
        tokens.append(int(token))
        times.append((time.process_time(), time.perf_counter()))
    # The generator has begun one token more than it gives.
    mx.synchronize()
    (cpu, wall), (last_cpu, last_wall) = times[0], times[-1]
    return Seconds(last_cpu - cpu, last_wall - wall), tokens


def measure(name: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """One form in one dtype: rates, ratios, controls."""
    os.environ["VLLM_MOE_COMPAT_DTYPE"] = dtype
    with tempfile.TemporaryDirectory() as folder:
        path, own = Path(folder, "release"), Path(folder, "mlx")
        path.mkdir()
        own.mkdir()
        write(path, args, name, dtype)
        ours, theirs = load_both(path, own)
        tokens = decode(ours, args.steps)[1]
        same = tokens == decode(theirs, args.steps)[1]
        rounds = [
            tuple(decode(model, args.steps)[0] for model in (theirs, ours, theirs))
            for _ in range(args.rounds)
        ]
    row: dict[str, Any] = {"form": name, "dtype": dtype}
    for clock in Seconds._fields:
        times = [tuple(getattr(turn, clock) for turn in turns) for turns in rounds]
        ratios = [(a + b) / 2 / mine for a, mine, b in times]
        row[clock] = {
            "ratio": median(ratios),
            "least": round(min(ratios), 3),
            "most": round(max(ratios), 3),
            "control": median([b / a for a, _, b in times]),
            "ours_tokens_per_s": median([args.steps / mine for _, mine, _ in times]),
            "mlx_lm_tokens_per_s": median([2 * args.steps / (a + b) for a, _, b in times]),
        }
    row |= {"same_tokens": same, "distinct_tokens": len(set(tokens))}
    row |= {"ours": classes(ours), "mlx_lm": classes(theirs)}
    say(json.dumps(row))
    return row


def median(values: list[float]) -> float:
    return round(statistics.median(values), 3)


def table(result: dict[str, Any]) -> str:
    lines = [
        "| form | dtype | clock | ratio | least to most | control | ours, tokens/s "
        "| mlx-lm, tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["cases"]:
        for clock in Seconds._fields:
            found = row[clock]
            lines.append(
                f"| {row['form']} | {row['dtype']} | {clock} | {found['ratio']:.2f} | "
                f"{found['least']:.2f} to {found['most']:.2f} | {found['control']:.2f} | "
                f"{found['ours_tokens_per_s']:.1f} | {found['mlx_lm_tokens_per_s']:.1f} |"
            )
    lines.append(f"\nsame tokens: {all(row['same_tokens'] for row in result['cases'])}")
    return "\n".join(lines)


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench/packed",
        description="Decode tokens/s of packed weights over mlx-lm's own checkpoint of them.",
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add(
        "--form", default=",".join(PACKED), help="forms, separated by commas (default: %(default)s)"
    )
    add("--dtype", default="float32", help="of float32,bfloat16: the activations' (%(default)s)")
    add("--layers", type=int, default=3)
    add("--hidden", type=int, default=1024, help="a multiple of 256 (default 1024)")
    add("--experts", type=int, default=32)
    add("--steps", type=int, default=16, help="tokens of a turn (default 16)")
    add("--rounds", type=int, default=7, help="rounds per case (default 7)")
    args = parser.parse_args(argv)
    for option, known in (("form", PACKED), ("dtype", DTYPES)):
        chosen = getattr(args, option).split(",")
        if unknown := set(chosen) - set(known):
            parser.error(f"--{option} knows {', '.join(known)}, not {', '.join(sorted(unknown))}")
        setattr(args, option, chosen)
    return args


def main() -> int:
    from _serve import machine

    args = parse()
    # Whatever the libraries print, stdout holds the result alone.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cases = [measure(form, dtype, args) for dtype in args.dtype for form in args.form]
    result = {"cases": cases, "machine": machine()}
    out.write((json.dumps(result) if args.json else table(result)) + "\n")
    out.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
