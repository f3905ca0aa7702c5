"""``LLM()`` as a user's script calls it: engine in a process of its own, forked on Linux."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.serve

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

path, prompt, count, mlx_first = sys.argv[1:]
if mlx_first == "mlx-first":
    import mlx.core as mx
    mx.eval(mx.ones(4) + 1)
llm = LLM(path, max_model_len=512, kv_cache_memory_bytes=32 << 20)
params = SamplingParams(temperature=0, max_tokens=int(count))
print("ANSWER" + json.dumps(llm.generate(prompt, params)[0].outputs[0].text))
# Left to the interpreter's exit, vLLM may end the engine before its clean-up.
llm.llm_engine.engine_core.shutdown(timeout=20)
"""


@pytest.mark.parametrize("mlx", ["no-mlx", pytest.param("mlx-first", marks=pytest.mark.full)])
def test_a_script_gets_the_golden_text_and_ends(mlx: str, demo_path: Path, tmp_path: Path) -> None:
    """Also one that used MLX itself before: a fork after that would hang."""
    golden = json.loads((demo_path / "golden.json").read_text())
    script = tmp_path / "script.py"
    lines = SCRIPT.strip().splitlines()
    if mlx == "mlx-first":
        # Then vLLM spawns, and Python asks for the guard.
        lines = ['if __name__ == "__main__":', *(f"    {line}" for line in lines)]
    script.write_text("\n".join(lines))
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_WORKER_MULTIPROC_METHOD"}
    result = subprocess.run(
        [
            *(sys.executable, str(script), str(demo_path)),
            *(golden["prompt"], str(golden["max_tokens"]), mlx),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (answer,) = [line for line in result.stdout.splitlines() if line.startswith("ANSWER")]
    assert json.loads(answer.removeprefix("ANSWER")) == golden["text"]
    assert "worker shut down" in result.stdout + result.stderr
