"""What the installed vLLM may call, read from its sources.

The names come from vLLM's own worker classes and from the calls that it makes, so a release with
a new method makes the tables of tests/serve incomplete, which their tests notice.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

_SPEC = importlib.util.find_spec("vllm")
assert _SPEC is not None
assert _SPEC.origin is not None
ROOT = Path(_SPEC.origin).parent
_RPC = re.compile(r'collective_rpc\(\s*"(\w+)"')


def methods(file: str, *classes: str) -> set[str]:
    """Public methods and properties that the classes of a file define."""
    tree = ast.parse((ROOT / file).read_text())
    return {
        item.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name in classes
        for item in node.body
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and item.name[0] != "_"
    }


def worker_methods() -> set[str]:
    """Methods of vLLM's workers, and names that vLLM sends to workers as text."""
    found = methods("v1/worker/worker_base.py", "WorkerBase")
    found |= methods("v1/worker/gpu_worker.py", "Worker")
    found |= methods("v1/worker/cpu_worker.py", "CPUWorker")
    for folder in ("v1", "entrypoints", "distributed", "benchmarks", "snapshot"):
        for path in (ROOT / folder).rglob("*.py"):
            found |= set(_RPC.findall(path.read_text()))
    return found
