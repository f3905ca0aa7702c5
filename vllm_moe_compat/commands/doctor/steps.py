"""The checks that run in a child process. A step returns its finding, or raises."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKENS = 16
PROMPT = "The quick brown fox"


def mlx() -> dict[str, Any]:
    """Import MLX and compute a sum on its device."""
    import mlx.core as mx

    device = mx.default_device()
    total = mx.sum(mx.arange(5)).item()
    if total != 10:
        raise ArithmeticError(f"0+1+2+3+4 is {total} on {device}")
    gpu = device.type == mx.DeviceType.gpu
    return {"device": str(device), "gpu": gpu}


def compile() -> dict[str, Any]:
    """Compile a kernel; MLX's CPU device needs g++ and a writable folder for that."""
    import mlx.core as mx

    @mx.compile
    def fused(x: Any) -> Any:
        return mx.exp(x * 2.0 + 1.0) * x

    # An unusual shape and unusual constants, so that no cached kernel fits.
    found = fused(mx.full((3, 17), 0.0)).sum().item()
    if found != 0.0:
        raise ArithmeticError(f"a compiled kernel gives {found} where 0 was expected")
    return {}


def mlx_lm() -> dict[str, Any]:
    """Import mlx-lm and install the hooks."""
    import mlx_lm.utils  # noqa: F401 - so that there is something to wrap

    import vllm_moe_compat

    vllm_moe_compat.apply()
    hooks = [hook.name for hook in vllm_moe_compat.status().hooks]
    if "mlx_lm.utils.load_config" not in hooks:
        raise RuntimeError("mlx_lm.utils.load_config could not be hooked")
    return {}


def platforms() -> dict[str, Any]:
    """Call every platform plugin that vLLM would call."""
    from importlib.metadata import entry_points

    allowed = os.environ.get("VLLM_PLUGINS")
    found: dict[str, str] = {}
    failed: dict[str, str] = {}
    for entry in entry_points(group="vllm.platform_plugins"):
        if allowed is not None and entry.name not in allowed.split(","):
            continue
        try:
            answer = entry.load()()
        except Exception as error:  # noqa: BLE001 - vLLM ignores a plugin that fails
            failed[entry.name] = f"{type(error).__name__}: {error}"
            continue
        if answer is not None:
            source = entry.dist.name if entry.dist is not None else entry.value
            found[entry.name] = f"{answer} (of {source})"
    from vllm_moe_compat.who_serves import decide

    return {"found": found, "failed": failed, "serves": decide()}


def demo() -> dict[str, Any]:
    """Build the demo checkpoint if it is missing."""
    from vllm_moe_compat import demo as package

    checkpoint = package.build(package.default_path())
    return {
        "path": str(checkpoint.path),
        "prompt": checkpoint.prompt,
        "text": checkpoint.text,
        "max_tokens": checkpoint.max_tokens,
    }


def plan(path: str) -> dict[str, Any]:
    """Plan a load of the checkpoint, as ``load_config`` does."""
    import mlx_lm.utils

    import vllm_moe_compat
    from vllm_moe_compat.load import context

    vllm_moe_compat.apply()
    mlx_lm.utils.load_config(Path(path))
    load = context.current.get()
    if load is None:
        return {"words": "a model that no row of the registry covers"}
    return {"words": f"{load.plan.module}, {load.plan.words}"}


def load(path: str, golden: str) -> dict[str, Any]:
    """Load through mlx-lm, strictly, and generate greedily twice."""
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.generate import generate_step

    import vllm_moe_compat
    from vllm_moe_compat.load.options import loading_with
    from vllm_moe_compat.load.report import last_report

    vllm_moe_compat.apply()
    expected = json.loads(golden)
    if expected:
        # The golden text was computed in float32.
        with loading_with(dtype="float32"):
            model, tokenizer = mlx_lm.load(path)
        model.set_dtype(mx.float32)
    else:
        model, tokenizer = mlx_lm.load(path)
    prompt = tokenizer.encode(expected.get("prompt", PROMPT), add_special_tokens=not expected)
    count = expected.get("max_tokens", TOKENS)

    def once() -> list[int]:
        return [int(t) for t, _ in generate_step(mx.array(prompt), model, max_tokens=count)]

    tokens = once()
    if once() != tokens:
        raise ArithmeticError("the same prompt gave two different greedy answers")
    _compare(tokenizer.decode(tokens), expected)
    report = last_report()
    return {"report": "" if report is None else str(report), "text": tokenizer.decode(tokens)}


def serve(path: str, golden: str) -> dict[str, Any]:
    """Serve with vLLM's engine in this process, and generate greedily twice."""
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    expected = json.loads(golden)
    settings: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 2, "seed": 0}
    llm = LLM(path, **settings)
    try:
        count = expected.get("max_tokens", TOKENS)
        greedy = SamplingParams(temperature=0, max_tokens=count)
        prompt = expected.get("prompt", PROMPT)
        # With a bar, and TQDM_DISABLE set, vLLM divides by an elapsed time of zero.
        answers = [
            llm.generate(prompt, greedy, use_tqdm=False)[0].outputs[0].text for _ in range(2)
        ]
    finally:
        llm.llm_engine.engine_core.shutdown()
    if answers[0] != answers[1]:
        raise ArithmeticError(f"one prompt gave two greedy answers, {answers[0]!r} first")
    _compare(answers[0], expected)
    return {"text": answers[0], "platform": type(current_platform).__name__, "others": others()}


def others() -> dict[str, str]:
    """Return module → where another library's wrapper of its class is, in words."""
    import vllm_moe_compat

    rows = vllm_moe_compat.status().rows
    return {row.module.rpartition(".")[2]: row.others for row in rows if row.wrapped_by}


def _compare(text: str, expected: dict[str, Any]) -> None:
    if expected and text != expected["text"]:
        raise ArithmeticError(
            f"the answer is {text!r}, where transformers generates {expected['text']!r} from the "
            "same weights"
        )


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    step.__name__: step for step in (mlx, compile, mlx_lm, platforms, demo, plan, load, serve)
}
