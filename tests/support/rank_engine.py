"""An engine of several ranks in processes of its own, as a script has it.

A process that has computed with MLX cannot fork, so a test would have to start each rank anew. This
one has not: vLLM forks the engine, and the engine its ranks, which takes half of the time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# The second one has the ranks compare what they do.
SETTINGS = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_MOE_COMPAT_CHECK_RANKS": "1"}


class EngineFailedError(AssertionError):
    """The engine ended; ``log`` is all that it wrote."""

    def __init__(self, log: str) -> None:
        super().__init__(log[-6000:])
        self.log = log


def run(model: Path, jobs: list[dict[str, Any]], **settings: Any) -> tuple[list[Any], str]:
    """Run jobs on ``vllm.LLM(model, **settings)``; return their results and the log.

    A job is ``{"prompts": token ids, "params": SamplingParams' arguments}``, with the answers'
    tokens as result; ``{"call": name}``, a call of all workers, with their answers or an error's
    sentence; ``{"sleep": level}``, with an error's sentence; ``{"held": True}``, with the bytes
    of weights that each rank holds; or ``{"drafts": True}``, with the number of draft tokens and
    how many of them were accepted, so far.
    """
    defaults: dict[str, Any] = {"seed": 0, "disable_log_stats": True}
    order = {"model": str(model), "jobs": jobs, "settings": defaults | settings}
    done = subprocess.run(
        [sys.executable, "-m", "support.rank_engine"],
        input=json.dumps(order),
        env={
            **os.environ,
            "VLLM_MOE_COMPAT_CHECK_RANKS": "1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
            "PYTHONPATH": _path(),
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    log = done.stdout + done.stderr
    if done.returncode:
        raise EngineFailedError(log)
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("RESULTS ")]
    return json.loads(line.removeprefix("RESULTS ")), log


def _path() -> str:
    tests = Path(__file__).resolve().parent.parent
    return os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])


def _do(llm: Any, job: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    if "sleep" in job:
        try:
            return llm.sleep(job["sleep"])
        except Exception as error:  # noqa: BLE001 - it is the result
            return str(error)
    if "held" in job:
        return llm.collective_rpc(lambda worker: worker.worker.served.weight_bytes)
    if "drafts" in job:
        counts = {metric.name: metric for metric in llm.get_metrics()}
        names = ("draft_tokens", "accepted_tokens")
        found = [counts.get(f"vllm:spec_decode_num_{name}") for name in names]
        return [0 if metric is None else metric.value for metric in found]
    if "spoil" in job:
        llm.collective_rpc(_other_order, args=(job["spoil"],))
        return None
    if "call" in job:
        try:
            return [str(answer) for answer in llm.collective_rpc(job["call"])]
        except Exception as error:  # noqa: BLE001 - it is the result
            return str(error)
    params = {"temperature": 0, "max_tokens": 24, "ignore_eos": True} | job.get("params", {})
    if choice := params.pop("choice", None):
        params["structured_outputs"] = StructuredOutputsParams(choice=choice)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    answers = llm.generate(prompts, SamplingParams(**params), use_tqdm=False)
    return [[list(one.outputs[0].token_ids), one.outputs[0].text] for one in answers]


def _other_order(worker: Any, rank: int) -> None:
    """Make a rank decode its requests in another order than the others do."""
    batch = worker.worker.runner.batch
    decodes = batch.decodes
    if worker.rank == rank:
        batch.decodes = lambda order, scheduled: decodes(order[::-1], scheduled)


def main() -> None:
    from vllm import LLM

    order = json.load(sys.stdin)
    llm = LLM(order["model"], **order["settings"])
    print("RESULTS", json.dumps([_do(llm, job) for job in order["jobs"]]), flush=True)


if __name__ == "__main__":
    main()
