"""The checks in order; a check runs only if the links that it needs are sound."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_moe_compat.commands.doctor import surroundings
from vllm_moe_compat.commands.doctor.child import Outcome, run
from vllm_moe_compat.commands.doctor.link import BROKEN, OK, SKIPPED, WARNING, Diagnosis, Link
from vllm_moe_compat.load.memory import host_memory
from vllm_moe_compat.load.report import size

SHORT_SECONDS = 120.0
ENGINE_BYTES = 3 * 2**29
"""Memory of vLLM, torch and a small model, without the weights."""

_IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
Check = Callable[[], Link]


@dataclass(slots=True)
class _Chain:
    """State that earlier checks leave for later ones."""

    model: Path | None
    timeout: float
    golden: dict[str, Any] = field(default_factory=dict)
    path: str = ""

    def links(self) -> Iterator[tuple[str, str, tuple[str, ...], Check]]:
        """Yield id, title, the ids of the links that are needed, and the check."""
        yield "python", "Python", (), surroundings.python
        yield "settings", "Settings", (), surroundings.settings
        yield "packages", "Packages", (), surroundings.packages
        yield "mlx", "MLX", ("packages",), self.mlx
        yield "compile", "MLX's compiler", ("mlx",), self.compile
        yield "mlx-lm", "mlx-lm and our hooks", ("mlx", "settings"), self.mlx_lm
        yield "vllm", "vLLM", (), surroundings.vllm
        yield "entry-points", "Entry points", ("vllm",), surroundings.entry
        yield "vllm-plugins", "VLLM_PLUGINS", ("vllm",), surroundings.allowed
        needed = ("vllm", "settings", "packages", "entry-points", "vllm-plugins")
        yield "platform", "Platform plugins", needed, self.platform
        yield "checkpoint", "Checkpoint", ("mlx-lm",), self.checkpoint
        yield "memory", "Memory", ("checkpoint",), self.memory
        yield "load", "Load through mlx-lm", ("checkpoint", "compile", "memory"), self.load
        yield "serve", "Serve with vLLM", ("load", "platform"), self.serve

    def mlx(self) -> Link:
        """Check that MLX can be imported and computes on this machine's device."""
        outcome = run("mlx", timeout=SHORT_SECONDS)
        title = "MLX"
        if outcome.error:
            remedy = "Reinstall MLX: pip install --force-reinstall 'vllm-moe-compat[mlx]'"
            return Link("mlx", title, BROKEN, f"it cannot be used: {outcome.error}", remedy)
        gpu = surroundings.wanted_gpu()
        if gpu and not outcome.found["gpu"]:
            return Link(
                "mlx",
                title,
                BROKEN,
                f"its device is {outcome.found['device']}, where {gpu} was expected",
                "Install the MLX build for that device and check its driver.",
            )
        return Link("mlx", title, OK, f"computes on {outcome.found['device']}")

    def compile(self) -> Link:
        """Check that MLX can compile a kernel at run time."""
        outcome = run("compile", timeout=SHORT_SECONDS)
        remedy = (
            "On a CPU, MLX needs g++ in PATH and a temporary folder (TMPDIR) that is writable and "
            "not mounted noexec."
        )
        return _link("compile", "MLX's compiler", outcome, "a fused kernel was compiled", remedy)

    def mlx_lm(self) -> Link:
        """Check that the hooks can be installed into mlx-lm."""
        outcome = run("mlx_lm", timeout=SHORT_SECONDS)
        remedy = "Install mlx-lm in a tested version: pip install 'vllm-moe-compat[mlx]'"
        return _link("mlx-lm", "mlx-lm and our hooks", outcome, "load_config is hooked", remedy)

    def platform(self) -> Link:
        """Check that exactly one platform plugin is active."""
        outcome = run("platforms", timeout=SHORT_SECONDS)
        title = "Platform plugins"
        if outcome.error:
            return Link("platform", title, BROKEN, outcome.error, "Follow the message.")
        found, (server, reason, problem) = outcome.found["found"], outcome.found["serves"]
        failed = "".join(f"; {n} failed ({w})" for n, w in outcome.found["failed"].items())
        ours = surroundings.ENTRY_POINTS["vllm.platform_plugins"]
        if len(found) > 1:
            rest = " and ".join(f"{n}, {w}" for n, w in found.items() if n != ours)
            besides = f", besides {ours}" if ours in found else ""
            remedy = surroundings.sentence(problem.partition("; ")[2]) if ours in found else ""
            return Link(
                "platform",
                title,
                BROKEN,
                f"vLLM accepts one platform plugin, and {len(found)} are active: {rest}{besides}"
                f"{failed}",
                remedy or "Uninstall the unwanted one, or set VLLM_PLUGINS to the wanted plugins.",
            )
        if server == "embedded" and ours not in found:
            detail = f"{ours} should serve here, since {reason}, but is not active{failed}"
            return Link("platform", title, BROKEN, detail, "Follow the message.")
        detail = f"{server} serves, since {reason}{failed}"
        if failed:
            return Link("platform", title, WARNING, detail, "Repair or uninstall it.")
        return Link("platform", title, OK, detail)

    def checkpoint(self) -> Link:
        """Check that the demo checkpoint can be built, or that the named one can be planned."""
        title = "Checkpoint"
        if self.model is None:
            outcome = run("demo", timeout=self.timeout)
            if "'vllm-moe-compat[demo]'" in outcome.error:
                detail = f"{outcome.error.partition(';')[0]}; name a MODEL to check that instead"
                return Link("checkpoint", title, SKIPPED, detail)
            if outcome.error:
                remedy = "Follow the message, or name a MODEL to check that instead."
                detail = f"the demo checkpoint cannot be built: {outcome.error}"
                return Link("checkpoint", title, BROKEN, detail, remedy)
            self.golden = dict(outcome.found)
            self.path = self.golden.pop("path")
        else:
            self.path = str(self.model)
        outcome = run("plan", self.path, timeout=SHORT_SECONDS)
        if outcome.error:
            words, _, remedy = outcome.error.partition("; ")
            remedy = surroundings.sentence(remedy) or "`vllm-moe-compat inspect` gives details."
            if self.model is None:  # A setting may be right for a larger model.
                remedy += " Or name a MODEL to check that instead."
            return Link("checkpoint", title, BROKEN, words, remedy)
        return Link("checkpoint", title, OK, f"{self.path}: {outcome.found['words']}")

    def memory(self) -> Link:
        """Check that the weights and an engine fit into memory."""
        total, free = host_memory()
        needed = ENGINE_BYTES
        needed += sum(file.stat().st_size for file in Path(self.path).glob("model*.safetensors"))
        detail = f"{size(free)} of {size(total)} are free, and at least {size(needed)} are needed"
        remedy = "Close other programs, set VLLM_MOE_COMPAT_QUANTIZE, or use a smaller model."
        if needed > total:
            return Link("memory", "Memory", BROKEN, detail, remedy)
        state = WARNING if needed > free else OK
        return Link("memory", "Memory", state, detail, remedy if state == WARNING else "")

    def load(self) -> Link:
        """Check that the checkpoint loads strictly and generates the same text twice."""
        outcome = run("load", self.path, json.dumps(self.golden), timeout=self.timeout)
        seen = "loaded, " + self._seen(outcome)
        remedy = "Follow the message; `vllm-moe-compat inspect` describes the checkpoint."
        return _link("load", "Load through mlx-lm", outcome, seen, remedy)

    def serve(self) -> Link:
        """Check that vLLM's engine serves it and generates the same text twice."""
        words = (self.path, json.dumps(self.golden))
        outcome = run("serve", *words, timeout=self.timeout, **_IN_PROCESS)
        seen = f"served by {outcome.found.get('platform')}, " + self._seen(outcome)
        remedy = "Follow the message, and see the troubleshooting section of the serving guide."
        return _link("serve", "Serve with vLLM", outcome, seen, remedy)

    def _seen(self, outcome: Outcome) -> str:
        text = " ".join(str(outcome.found.get("text", "")).split())
        text = f"{text[:40]}…" if len(text) > 40 else text
        others = "".join(f"; {n} is {w}" for n, w in outcome.found.get("others", {}).items())
        return f"{'the golden text' if self.golden else 'the same answer twice'}: {text!r}{others}"


def _link(id: str, title: str, outcome: Outcome, seen: str, remedy: str) -> Link:
    if outcome.error:
        return Link(id, title, BROKEN, outcome.error, remedy)
    return Link(id, title, OK, seen)


def examine(
    model: Path | None = None,
    *,
    timeout: float = 600.0,
    report: Callable[[Link], object] = lambda link: None,
) -> Diagnosis:
    """Run the checks.

    Args:
        model: a checkpoint's folder; None for the demo checkpoint, which is built if missing.
        timeout: limit in seconds for building, for loading and for serving.
        report: called with each link as soon as it is checked.
    """
    links: dict[str, Link] = {}
    for id, title, needs, check in _Chain(model, timeout).links():
        missing = next((links[n] for n in needs if links[n].state in (BROKEN, SKIPPED)), None)
        began = time.perf_counter()
        if missing is None:
            link = replace(check(), seconds=time.perf_counter() - began)
        elif missing.state == SKIPPED:
            link = Link(id, title, SKIPPED, missing.detail)
        else:
            link = Link(id, title, SKIPPED, f"{missing.title} is broken")
        links[id] = link
        report(link)
    return Diagnosis(list(links.values()))
