"""Where the time of a start goes, in CPU seconds and wall time.

Each start is a process of its own, with the engine in it. Functions are wrapped by timers, and
what a function calls is counted where it happens: the rows are exclusive and add up to the total.
CPU seconds include compilers that MLX starts. A cold start has empty caches: MLX keeps compiled
kernels in the temporary folder, vLLM its own files in ``VLLM_CACHE_ROOT``. A warm start follows
it with the same caches.

The last row is a real server: from its start until ``/health`` answers, all its processes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from _server import checkpoint

from vllm_moe_compat.demo.server import Server, free_port, serve_command

# Module, function and row of what is timed inside ``LLM()``.
TIMED = (
    ("vllm.engine.arg_utils", "EngineArgs.create_engine_config", "vLLM: configuration"),
    ("vllm_moe_compat.backend.vllm.worker", "MlxWorker.load_model", "load: the rest of it"),
    ("mlx_lm.utils", "load_model", "load: mlx-lm and the load plan"),
    ("vllm_moe_compat.backend.model.loader", "describe", "load: dry runs"),
    ("vllm_moe_compat.backend.model.loader", "dry_run", "load: dry runs"),
    ("vllm_moe_compat.backend.model.loader", "_cast", "load: weights read and cast"),
    (
        "vllm_moe_compat.backend.vllm.worker",
        "MlxWorker.determine_available_memory",
        "budget: measured passes",
    ),
    ("vllm_moe_compat.backend.vllm.worker", "MlxWorker.initialize_from_config", "pages"),
    (
        "vllm_moe_compat.backend.vllm.worker",
        "MlxWorker.compile_or_warm_up_model",
        "self-check and warm-up",
    ),
)
IMPORTS = (
    ("import torch", ("torch",)),
    ("import transformers", ("transformers", "transformers.models.auto")),
    ("import MLX and mlx-lm", ("mlx.core", "mlx.nn", "mlx_lm.utils")),
    ("import vLLM", ("vllm", "vllm.entrypoints.llm", "vllm.v1.engine.core")),
    ("import the worker of this package", ("vllm_moe_compat.backend.vllm.worker",)),
)
REST = "vLLM: engine, tokenizer, scheduler"


class Timer:
    """Exclusive wall and CPU seconds per row."""

    def __init__(self) -> None:
        self.rows: dict[str, list[float]] = {}
        self._open = [REST]
        self._last = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), sum(os.times()[:4])

    def _charge(self) -> None:
        now = self._now()
        row = self.rows.setdefault(self._open[-1], [0.0, 0.0])
        row[0] += now[0] - self._last[0]
        row[1] += now[1] - self._last[1]
        self._last = now

    def enter(self, row: str) -> None:
        """Charge what passed to the row that was open, and open ``row``."""
        self._charge()
        self._open.append(row)

    def leave(self) -> None:
        """Charge what passed to the open row, and close it."""
        self._charge()
        self._open.pop()

    def wrap(self, module: str, name: str, row: str) -> None:
        """Time every call of a function or method."""
        owner: Any = importlib.import_module(module)
        *parents, last = name.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        function: Callable[..., Any] = getattr(owner, last)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(row)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        setattr(owner, last, timed)


def start_here(path: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Start an engine in this process; return seconds by row, and the first answer's."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    timer = Timer()
    for row, modules in IMPORTS:
        timer.enter(row)
        for module in modules:
            importlib.import_module(module)
        timer.leave()
    for module, name, row in TIMED:
        timer.wrap(module, name, row)
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(path, skip_tokenizer_init=True, **settings)
    timer.enter("first request")
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    llm.generate(TokensPrompt(prompt_token_ids=[1, 2, 3, 4]), params, use_tqdm=False)
    timer.leave()
    return {"rows": timer.rows, "rss_mib": psutil.Process().memory_info().rss / 2**20}


def in_child(path: Path, settings: dict[str, Any], caches: Path) -> dict[str, Any]:
    """Run ``start_here`` in a process of its own, with caches in ``caches``."""
    command = [sys.executable, __file__, "--child", str(path), "--settings", json.dumps(settings)]
    done = subprocess.run(
        command, env=_environment(caches), capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"the start failed:\n{(done.stdout + done.stderr)[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _environment(caches: Path) -> dict[str, str]:
    for name in ("tmp", "vllm"):
        (caches / name).mkdir(parents=True, exist_ok=True)
    own = {"TMPDIR": str(caches / "tmp"), "VLLM_CACHE_ROOT": str(caches / "vllm")}
    return os.environ | own | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def serve(path: Path, options: list[str], caches: Path) -> tuple[float, float]:
    """Start a server; return wall and CPU seconds until ``/health`` answers."""
    port = free_port(None)
    before = dict(os.environ)
    os.environ.update(_environment(caches))
    try:
        server = Server(serve_command(path, port, options), port, caches / "server.log")
    finally:
        os.environ.clear()
        os.environ.update(before)
    try:
        wall = server.wait_ready(600, lambda seconds, line: None)
        return wall, _cpu_of_tree(server.pid)
    finally:
        server.stop()


def _cpu_of_tree(pid: int) -> float:
    parent = psutil.Process(pid)
    total = 0.0
    for process in [parent, *parent.children(recursive=True)]:
        times = process.cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
    return total


def write_30_layers(path: Path) -> None:
    """Write a dense model of 30 layers with random weights, 135 million in all."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "vocab_size": 49152,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "eos_token_id": 0,
    }
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})


def measure(path: Path, settings: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Return rows of a cold start and medians of warm ones, of a process and of a server."""
    with tempfile.TemporaryDirectory() as folder:
        caches = Path(folder)
        cold = in_child(path, settings, caches)
        warm = [in_child(path, settings, caches) for _ in range(rounds)]
        rows = {
            row: {
                "cold": cold["rows"].get(row, [0.0, 0.0]),
                "warm": [statistics.median(run["rows"][row][i] for run in warm) for i in (0, 1)],
            }
            for row in warm[0]["rows"]
        }
        options = [part for name, value in settings.items() for part in _option(name, value)]
        options.append("--skip-tokenizer-init")
        served = serve(path, options, caches)
    total = {
        kind: [sum(row[kind][i] for row in rows.values()) for i in (0, 1)]
        for kind in ("cold", "warm")
    }
    rss = statistics.median(run["rss_mib"] for run in warm)
    return {"rows": rows, "total": total, "server_warm": list(served), "rss_mib": rss}


def _option(name: str, value: Any) -> list[str]:
    return [f"--{name.replace('_', '-')}", str(value)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/start", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--rounds", type=int, default=3, help="warm starts (default 3)")
    parser.add_argument(
        "--kv-cache-memory-bytes", type=int, default=256 << 20, help="default 256 MiB; 0: automatic"
    )
    parser.add_argument("--models", default="demo,30-layers", help="default: demo,30-layers")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(start_here(args.child, json.loads(args.settings))))
        return
    settings: dict[str, Any] = {}
    if args.kv_cache_memory_bytes:
        settings["kv_cache_memory_bytes"] = args.kv_cache_memory_bytes
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models.split(","):
            if name == "demo":
                path = checkpoint(None)
            else:
                path = Path(folder) / name
                write_30_layers(path)
            print(f"measuring {name}", file=sys.stderr)
            found[name] = measure(path, settings, args.rounds)
    result = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        **{name: version(name) for name in ("vllm", "mlx", "mlx-lm", "torch", "transformers")},
        "models": found,
    }
    if args.json:
        print(json.dumps(result))
        return
    for name, figures in found.items():
        print(f"\n{name:40} cold: CPU s   wall s   warm: CPU s   wall s")
        rows = {**figures["rows"], "all, until the first answer": figures["total"]}
        for row, kinds in rows.items():
            cells = [kinds[kind][i] for kind in ("cold", "warm") for i in (1, 0)]
            print(f"{row:40} {cells[0]:11.2f} {cells[1]:8.2f} {cells[2]:13.2f} {cells[3]:8.2f}")
        wall, cpu = figures["server_warm"]
        print(f"{'a server, until /health answers':40} {'':20} {cpu:13.2f} {wall:8.2f}")
        print(f"resident after the first answer: {figures['rss_mib']:.0f} MiB")


if __name__ == "__main__":
    main()
