"""Loading quantised experts: this package, the straightforward way, and the bytes alone.

The checkpoint has the experts of a Qwen3.5 MoE (hidden 2048, intermediate 512, 256
experts, each on its own, in one of the forms of ``_forms``) and as little else as the
class allows. A round loads it once in each way, each in a process of its own; the order
is reversed every other round, and memory is touched before each. Files are in the page
cache.

``straightforward``, for FP8 only: dequantise every tensor as a whole in float32, round,
stack, concatenate gate and up, and let mlx-lm slice them again. ``raw``: read the files
and write as many bytes as the weights have in memory, twice as many for FP8. Peaks are
resident memory over what the process held after its imports; ``checksum`` says that both
made the same parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from _forms import BLOCK, FORMS

HIDDEN, INTERMEDIATE, EXPERTS = 2048, 512, 256
PREFIX = "model.language_model."
SHAPES = {
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}
SETTINGS = ("8bit", "mxfp8", "6bit", "4bit")


def config(layers: int, form: str) -> dict[str, Any]:
    """A config with one gated-delta layer per MoE layer, and a tiny vocabulary."""
    text = {
        "model_type": "qwen3_5_moe_text",
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": INTERMEDIATE,
        "shared_expert_intermediate_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 1000,
        "rms_norm_eps": 1e-6,
        "vocab_size": 128,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    }
    return {
        "model_type": "qwen3_5_moe",
        "text_config": text,
        "tie_word_embeddings": False,
        "quantization_config": FORMS[form].config,
    }


def write(path: Path, layers: int, form: str) -> int:
    """Write the checkpoint, a shard per layer; return its bytes."""
    import mlx.core as mx
    import mlx_lm.utils
    from mlx.utils import tree_flatten
    from safetensors.torch import save_file

    settings = config(layers, form)
    (path / "config.json").write_text(json.dumps(settings))
    model_class, args_class = mlx_lm.utils._get_classes(settings)
    model = model_class(args_class.from_dict(settings))
    rest = {
        PREFIX + name.removeprefix("language_model.model.")
        if "lm_head" not in name
        else "lm_head.weight": array.astype(mx.bfloat16)
        for name, array in tree_flatten(model.parameters())
        if "switch_mlp" not in name
    }
    mx.save_safetensors(str(path / "model-rest.safetensors"), rest)
    draw = np.random.default_rng(0)
    for layer in range(layers):
        tensors = {}
        for expert in range(EXPERTS):
            for name, (rows, columns) in SHAPES.items():
                module = f"{PREFIX}layers.{layer}.mlp.experts.{expert}.{name}"
                tensors |= FORMS[form].store(draw, module, rows, columns)
        save_file(tensors, path / f"model-{layer:05}.safetensors")
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def straightforward(model: Any, original: Any, weights: dict[str, Any]) -> Any:
    """What a shim without a plan does in ``sanitize``."""
    import mlx.core as mx

    plain = {}
    for name, weight in weights.items():
        scale = weights.get(f"{name}_scale_inv")
        if name.endswith("_scale_inv"):
            continue
        if scale is None:
            plain[name] = weight
            continue
        rows, columns = weight.shape
        tiles = mx.from_fp8(weight, dtype=mx.float32)
        tiles = tiles.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        product = tiles * scale.astype(mx.float32)[:, None, :, None]
        plain[name] = product.reshape(rows, columns).astype(mx.bfloat16)
    for layer in range(model.language_model.args.num_hidden_layers):
        base = f"{PREFIX}layers.{layer}.mlp.experts"
        stacks = {
            name: mx.stack([plain.pop(f"{base}.{e}.{name}.weight") for e in range(EXPERTS)])
            for name in SHAPES
        }
        fused = mx.concatenate([stacks["gate_proj"], stacks["up_proj"]], axis=1)
        plain[f"{base}.gate_up_proj"] = fused
        plain[f"{base}.down_proj"] = stacks["down_proj"]
    return original(model, plain)


def resident() -> int:
    """Bytes resident now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def peak() -> int:
    """The most bytes that were resident since ``clear_peak``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def clear_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def raw(path: Path, growth: int) -> int:
    """Read every byte and write that many for each."""
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    final = np.empty(growth * size, dtype=np.uint8)
    buffer = np.empty(2**24, dtype=np.uint8)
    at = 0
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb", buffering=0) as source:
            while count := source.readinto(memoryview(buffer)):
                for _ in range(growth):
                    final[at : at + count] = buffer[:count]
                    at += count
    return final.nbytes


def warm(size: int) -> None:
    """Touch as much memory as a run will take, so that a virtual machine has it.

    Memory that a host has not handed out yet takes ten times as long to touch, and the
    first run of a round would pay for all.
    """
    code = "import sys, numpy as np; np.ones(int(sys.argv[1]), dtype=np.uint8)"
    subprocess.run([sys.executable, "-c", code, str(size)], check=True)


def child(mode: str, form: str, path: Path) -> dict[str, Any]:
    """Load once; this is the process that is measured."""
    os.environ["VLLM_MOE_COMPAT_DTYPE"] = "bfloat16"
    os.environ["VLLM_MOE_COMPAT_QUANTIZE"] = mode if mode in SETTINGS else "none"
    import mlx.core as mx
    import mlx_lm.utils
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3_5_moe

    import vllm_moe_compat

    if mode == "straightforward":
        original = qwen3_5_moe.Model.sanitize
        qwen3_5_moe.Model.sanitize = lambda model, weights: straightforward(
            model, original, weights
        )
    else:
        vllm_moe_compat.apply()
    mx.eval(mx.ones(1))
    clear_peak()
    base, began, cpu = resident(), time.perf_counter(), time.process_time()
    if mode == "raw":
        final, checksum = raw(path, FORMS[form].growth), 0
    else:
        model, _ = mlx_lm.utils.load_model(path)
        final = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    result = {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - began,
        "peak": peak() - base,
        "after": resident() - base,
        "final": final,
    }
    if mode != "raw":
        checksum = 0
        for name, array in sorted(tree_flatten(model.parameters())):
            if "switch_mlp" in name:
                for part in array if array.ndim > 1 else [array]:
                    checksum = zlib.crc32(memoryview(mx.contiguous(part).view(mx.uint8)), checksum)
    return result | {"checksum": checksum}


def measure(path: Path, form: str, modes: list[str], rounds: int) -> dict[str, Any]:
    """Rounds of one load in each way, and their medians."""
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    disk = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    for number in range(rounds):
        for mode in modes if number % 2 == 0 else modes[::-1]:
            warm(int(2.3 * disk))
            command = [sys.executable, __file__, "--child", mode, form, str(path)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            runs[mode].append(json.loads(done.stdout))
            last = runs[mode][-1]
            say(
                f"round {number + 1}/{rounds} {mode}: {last['cpu_s']:.2f} CPU s, peak "
                f"{last['peak'] / last['final']:.3f} of {last['final'] / 2**20:,.0f} MiB"
            )
    rows = {}
    for mode, found in runs.items():
        final = found[0]["final"]
        rows[mode] = {
            "cpu_s": round(statistics.median(run["cpu_s"] for run in found), 3),
            "wall_s": round(statistics.median(run["wall_s"] for run in found), 3),
            "final_bytes": final,
            "peak_ratio": round(max(run["peak"] for run in found) / final, 4),
            "after_ratio": round(max(run["after"] for run in found) / final, 4),
        }
        for other in {"straightforward", "raw"} & set(runs):
            pairs = zip(found, runs[other], strict=True)
            ratios = [one["cpu_s"] / two["cpu_s"] for one, two in pairs]
            rows[mode][f"cpu_over_{other}"] = round(statistics.median(ratios), 3)
    result: dict[str, Any] = {"rows": rows}
    if "straightforward" in runs:
        same = {run["checksum"] for mode in ("ours", "straightforward") for run in runs[mode]}
        result["same_parameters"] = len(same) == 1
    return result


def keys(layers: int) -> dict[str, Any]:
    """Time per key of everything that is done to names alone."""
    from vllm_moe_compat.checkpoint.headers import TensorInfo
    from vllm_moe_compat.checkpoint.layout import detect
    from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
    from vllm_moe_compat.plan.estimate import estimate
    from vllm_moe_compat.plan.planner import make_plan

    tensors = {}
    for layer in range(layers):
        for expert in range(EXPERTS):
            for name, shape in SHAPES.items():
                key = f"{PREFIX}layers.{layer}.mlp.experts.{expert}.{name}.weight"
                grid = (shape[0] // BLOCK, shape[1] // BLOCK)
                tensors[key] = TensorInfo("F8_E4M3", shape)
                tensors[f"{key}_scale_inv"] = TensorInfo("BF16", grid)
    row = TRANSFORMS_BY_MODULE["mlx_lm.models.qwen3_5_moe"]
    settings = config(layers, "fp8")
    times = []
    for _ in range(5):
        began = time.process_time()
        plan = make_plan(detect(tensors, settings, row.ignored), row, settings)
        planned = time.process_time() - began
        estimate(plan, tensors, "BF16")
        times.append((planned, time.process_time() - began))
    planned, both = (min(column) for column in zip(*times, strict=True))
    count = len(tensors)
    return {
        "keys": count,
        "plan_us_per_key": round(planned / count * 1e6, 2),
        "with_estimate_us_per_key": round(both / count * 1e6, 2),
    }


def machine() -> dict[str, Any]:
    from _serve import machine as described

    return described()


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def table(result: dict[str, Any]) -> str:
    lines = [
        "| form | layers | | CPU s | ÷ straightforward | ÷ raw | final MiB | peak ÷ final "
        "| after ÷ final |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        for mode, row in case["rows"].items():
            lines.append(
                f"| {case['form']} | {case['layers']} | {mode} | {row['cpu_s']:.2f} | "
                f"{row.get('cpu_over_straightforward', '')} | {row['cpu_over_raw']} | "
                f"{row['final_bytes'] / 2**20:,.0f} | {row['peak_ratio']:.3f} | "
                f"{row['after_ratio']:.3f} |"
            )
    if compared := [c["same_parameters"] for c in result["cases"] if "same_parameters" in c]:
        lines.append(f"\nsame parameters: {all(compared)}")
    lines += [f"{k['keys']:,} keys: {k['plan_us_per_key']} µs per key" for k in result["keys"]]
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench/load",
        description="CPU time and peak memory of loading quantised experts (Linux only).",
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add(
        "--form",
        default="fp8",
        help=f"forms of the experts, separated by commas, of {','.join(FORMS)} (default fp8)",
    )
    add("--full", action="store_true", help="8 layers too (30 GB of disk and memory traffic)")
    add("--layers", help="numbers of layers, separated by commas (default 1,2)")
    add("--rounds", type=int, default=3, help="rounds per case (default 3)")
    add(
        "--quantize",
        default="",
        help=f"settings to measure too, separated by commas, of {','.join(SETTINGS)}",
    )
    add("--child", nargs=3, metavar=("MODE", "FORM", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.quantize = [name for name in args.quantize.split(",") if name]
    if args.full and not args.quantize:
        args.quantize = list(SETTINGS)
    if unknown := set(args.quantize) - set(SETTINGS):
        parser.error(f"--quantize knows {', '.join(SETTINGS)}, not {', '.join(sorted(unknown))}")
    args.form = args.form.split(",")
    if unknown := set(args.form) - set(FORMS):
        parser.error(f"--form knows {', '.join(FORMS)}, not {', '.join(sorted(unknown))}")
    if args.quantize and args.form != ["fp8"]:
        parser.error("--quantize and --full are for --form fp8; other forms stay packed")
    chosen = args.layers or ("1,2,8" if args.full else "1,2")
    args.layers = [int(part) for part in chosen.split(",")]
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    cases = []
    for form in args.form:
        plain = ["straightforward"] if form == "fp8" else []
        modes = ["ours", *plain, "raw", *args.quantize]
        for layers in args.layers:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder)
                size = write(path, layers, form)
                say(f"{form}, {layers} layers: {size / 2**20:,.0f} MiB written")
                case = {"form": form, "layers": layers, "disk_bytes": size}
                cases.append(case | measure(path, form, modes, args.rounds))
    planned = [keys(20), keys(40)] if "fp8" in args.form else []
    return {"cases": cases, "keys": planned, "machine": machine()}


def main() -> int:
    args = parse()
    # Whatever the libraries print, stdout holds the result alone.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if args.child:
        out.write(json.dumps(child(*args.child[:2], Path(args.child[2]))) + "\n")
        return 0
    result = run(args)
    out.write((json.dumps(result) if args.json else table(result)) + "\n")
    out.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
