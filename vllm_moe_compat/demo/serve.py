"""``python -m vllm_moe_compat.demo.serve``: the demo.

It builds the demo checkpoint if it is missing, starts ``vllm serve`` on it, prints the
plugin's log messages, streams one answer over HTTP, and stops the server. The client uses
the standard library only.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from vllm_moe_compat.demo.builder import DemoCheckpoint, build, default_path
from vllm_moe_compat.demo.server import (
    HOST,
    Server,
    ServerError,
    free_port,
    plugin_lines,
    serve_command,
)


def say(line: str = "") -> None:
    """Print a line and flush."""
    print(line, flush=True)


def stream_completion(server: Server, prompt: str, tokens: int) -> Iterator[str]:
    """Request a greedy streaming completion; yield the text as it arrives.

    Raises:
        ServerError: the server refuses the request, or dies during the answer.
    """
    request = {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
    }
    connection = http.client.HTTPConnection(HOST, server.port, timeout=120)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(request), headers)
        response = connection.getresponse()
        if response.status != 200:
            body = response.read().decode(errors="replace")
            raise ServerError(f"the server answers {response.status}: {body}")
        for raw in response:
            data = raw.decode().strip().removeprefix("data: ")
            if data and data != "[DONE]":
                yield _text(json.loads(data))
    except (OSError, http.client.HTTPException) as error:
        time.sleep(1)  # so that a dying server can log the reason
        server.check_alive()
        raise ServerError(
            f"the connection broke while the server answered: {error!r}; "
            f"the server's log: {server.log_path}"
        ) from error
    finally:
        connection.close()


def _text(chunk: dict[str, Any]) -> str:
    if "error" in chunk:
        raise ServerError(
            f"the server ended the answer with an error: {json.dumps(chunk['error'])}"
        )
    return "".join(choice["text"] for choice in chunk["choices"])


def progress_printer() -> Callable[[float, str], None]:
    """Return a progress callback: one live line on a terminal, else a line per message."""
    shown, at = "", 0.0

    def live(elapsed: float, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        print("\r\033[K" + f"  {elapsed:5.1f} s  {text}"[:width], end="", flush=True)

    def plain(elapsed: float, text: str) -> None:
        nonlocal shown, at
        if text != shown or elapsed - at >= 10:
            shown, at = text, elapsed
            say(f"  {elapsed:5.1f} s  {text}"[:118].rstrip())

    return live if sys.stdout.isatty() else plain


def converse(server: Server, checkpoint: DemoCheckpoint, prompt: str) -> bool:
    """Send the prompt and print the answer as it arrives; return whether it is right.

    The right answer is known only for the checkpoint's own prompt.
    """
    began = time.monotonic()
    answer = ""
    say()
    print(prompt, end="", flush=True)
    for piece in stream_completion(server, prompt, checkpoint.max_tokens):
        print(piece, end="", flush=True)
        answer += piece
    say()
    say()
    say(f"Answered in {time.monotonic() - began:.1f} s.")
    if prompt != checkpoint.prompt:
        return True
    if answer == checkpoint.text:
        say("The text is the one that transformers generates from the same FP8 weights.")
        return True
    say(f"WRONG: transformers generates this from the same FP8 weights:\n{checkpoint.text}")
    return False


def run(arguments: argparse.Namespace, options: list[str]) -> int:
    """Run the demo; return the exit code."""
    say(f"Demo checkpoint: {arguments.checkpoint}")
    checkpoint = build(arguments.checkpoint, progress=lambda line: say(f"  {line}"))
    port = free_port(arguments.port)
    log = arguments.log or checkpoint.path.with_name(f"{checkpoint.path.name}-server.log")
    say(f"Starting vllm serve on {HOST}:{port}; its log: {log}")
    server = Server(serve_command(checkpoint.path, port, options), port, log)
    keep = False
    try:
        took = server.wait_ready(arguments.timeout, progress_printer())
        say(("\r\033[K" if sys.stdout.isatty() else "") + f"Ready after {took:.1f} s.")
        say("What the plugin found and did:")
        for line in plugin_lines(server.log()) or ["nothing: it logged no line; see the log"]:
            say(f"  {line}")
        right = converse(server, checkpoint, arguments.prompt or checkpoint.prompt)
        keep = arguments.keep and right
    finally:
        if not keep and not server.stop():
            say("The server did not stop on SIGTERM; it was killed.")
    if keep:
        body = json.dumps({"model": "demo", "prompt": checkpoint.prompt, "max_tokens": 40})
        say("The server stays up. Ask it:")
        say(f"  curl -s http://{HOST}:{port}/v1/completions \\")
        say(f"    -H 'Content-Type: application/json' -d '{body}'")
        say(f"and stop it with: kill {server.pid}")
    else:
        say("The server has stopped.")
    return 0 if right else 1


def main() -> int:
    """Parse the command line; arguments after ``--`` go to ``vllm serve``."""
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description="Serve a small FP8 MoE checkpoint with vLLM on MLX, and ask it something.",
        epilog="Arguments after -- go to vllm serve.",
    )
    parser.add_argument("prompt", nargs="?", help="default: the beginning of the Zen of Python")
    parser.add_argument("--keep", action="store_true", help="leave the server running")
    parser.add_argument("--port", type=int, help="default: a free one")
    parser.add_argument(
        "--timeout", type=float, default=300, help="seconds to wait for the server (%(default)s)"
    )
    parser.add_argument("--checkpoint", type=Path, default=default_path(), help="its folder")
    parser.add_argument("--log", type=Path, help="the server's output; default: beside it")
    arguments = parser.parse_args(words[:cut])

    def on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        return run(arguments, words[cut + 1 :])
    except (ServerError, ValueError, RuntimeError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
