"""Throughput over HTTP, by vLLM's own ``vllm bench serve`` with its random data set.

A real server and a real client in processes of their own, on the same cores: the
figures hold what the API server, the tokenizer and the client cost as well. The
prompts are random tokens, so nothing of them is found in a prefix cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _server import HOST, Server, add_model, checkpoint, served

KEPT = (
    *("completed", "failed", "duration", "total_input_tokens", "total_output_tokens"),
    *("request_throughput", "output_throughput", "total_token_throughput"),
    *(f"{kind}_{what}_ms" for what in ("ttft", "tpot", "itl") for kind in ("median", "p99")),
)


def measure(server: Server, model: Path, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run of ``vllm bench serve``; what it says of it."""
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"),
        *("--backend", "openai", "--host", HOST, "--port", str(server.port)),
        *("--model", str(model), "--served-model-name", "demo"),
        *("--dataset-name", "random", "--seed", "0", "--temperature", "0", "--ignore-eos"),
        *("--random-input-len", str(args.input), "--random-output-len", str(args.output)),
        *("--num-prompts", str(args.prompts), "--max-concurrency", str(args.concurrency)),
        *("--num-warmups", "2", "--percentile-metrics", "ttft,tpot,itl"),
        *("--disable-tqdm", "--save-result"),
        *("--result-dir", str(folder), "--result-filename", "result.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"vllm bench serve failed:\n{(done.stdout + done.stderr)[-4000:]}")
    result = json.loads((folder / "result.json").read_text())
    return {name: round(result[name], 2) for name in KEPT}


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/http", description=__doc__)
    add_model(parser)
    parser.add_argument("--prompts", type=int, default=64, help="requests (default 64)")
    parser.add_argument("--input", type=int, default=512, help="tokens of a prompt (default 512)")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer (default 64)")
    parser.add_argument("--concurrency", type=int, default=8, help="at once (default 8)")
    args = parser.parse_args()
    model = checkpoint(args.model)
    options = ("--max-num-seqs", str(args.concurrency))
    with served(model, "http", options) as server, tempfile.TemporaryDirectory() as folder:
        figures = measure(server, model, args, Path(folder))
    result = {
        "model": model.name,
        "input": args.input,
        "output": args.output,
        "concurrency": args.concurrency,
        "machine": platform.machine(),
        **{name: version(name) for name in ("vllm", "mlx", "mlx-lm")},
        **figures,
    }
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:24} {value}")


if __name__ == "__main__":
    main()
