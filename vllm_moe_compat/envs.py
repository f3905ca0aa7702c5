"""The environment variables of the package.

``VARIABLES`` is the only table: the readers, docs/environment.md and the list that is
registered with vLLM (which warns about unknown ``VLLM_*`` variables) come from it. Values
are read at call time, so a test or a parent process can change them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType

from vllm_moe_compat.errors import SettingError

_NONE: Mapping[str, str] = MappingProxyType({})
_overrides: ContextVar[Mapping[str, str]] = ContextVar("vllm_moe_compat_environment", default=_NONE)


@contextmanager
def override(values: Mapping[str, str]) -> Iterator[None]:
    """Override variables for the ``with`` block, in this thread only; name → value."""
    token = _overrides.set({**_overrides.get(), **values})
    try:
        yield
    finally:
        _overrides.reset(token)


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable.

    Attributes:
        name: of the variable.
        default: the value when unset or empty.
        doc: its effect, for the documentation.
        choices: the valid values; empty where any value is valid.
        kind: ``switch``, ``choice``, ``size``, ``folder`` or ``file``.
    """

    name: str
    default: str
    doc: str
    choices: tuple[str, ...] = ()
    kind: str = "choice"

    def read(self) -> str:
        """Return the value, or the default when unset or empty.

        Raises:
            SettingError: the value is not one of the choices.
        """
        given = _overrides.get().get(self.name, os.environ.get(self.name, ""))
        value = given.strip() or self.default
        if self.choices and value not in self.choices:
            raise SettingError(
                f"{self.name}={value!r} is not a valid value; set it to one of "
                f"{', '.join(self.choices)}, or unset it for {self.default!r}."
            )
        return value


ENABLED = Variable(
    "VLLM_MOE_COMPAT",
    "1",
    "0 switches the plugin off: no hook is installed and no platform is offered.",
    ("0", "1"),
    "switch",
)
BACKEND = Variable(
    "VLLM_MOE_COMPAT_BACKEND",
    "auto",
    "The platform that serves: auto (another active platform plugin such as vllm-metal, else "
    "vLLM's own kernels, else the embedded MLX platform), embedded (the embedded one; other active "
    "platform plugins have to be left out of VLLM_PLUGINS), off (never the embedded one).",
    ("auto", "embedded", "off"),
)
DTYPE = Variable(
    "VLLM_MOE_COMPAT_DTYPE",
    "auto",
    "The dtype of dequantised FP8 weights: auto (the serving dtype under vLLM; elsewhere bfloat16, "
    "or float32 on MLX's CPU device, whose gather_mm supports no other), bfloat16, float16, "
    "float32.",
    ("auto", "bfloat16", "float16", "float32"),
)
QUANTIZE = Variable(
    "VLLM_MOE_COMPAT_QUANTIZE",
    "none",
    "The format that weights are quantised to during the load: none, 8bit (affine, group 64), "
    "mxfp8, 6bit, 4bit. Each tensor is packed as soon as it is made; there is no float copy of "
    "the model.",
    ("none", "8bit", "mxfp8", "6bit", "4bit"),
)
EXPERT_CACHE = Variable(
    "VLLM_MOE_COMPAT_EXPERT_CACHE",
    "off",
    "The memory for weights of routed experts, over all layers: off (all of them stay in memory), "
    "a share of them (25%), or a size (8GiB). Experts beyond it are read from disk when a token "
    "needs them.",
    kind="size",
)
COLLECTIVES = Variable(
    "VLLM_MOE_COMPAT_COLLECTIVES",
    "auto",
    "What MLX's collectives between the ranks of one engine run over: auto (nccl where each rank "
    "has a CUDA device, jaccl on Metal where MLX has it and MLX_IBV_DEVICES is set, else ring), "
    "ring (TCP, in every MLX), jaccl (RDMA over Thunderbolt), nccl, mpi. It must be the same on "
    "all machines.",
    ("auto", "ring", "jaccl", "nccl", "mpi"),
)
CHECK_RANKS = Variable(
    "VLLM_MOE_COMPAT_CHECK_RANKS",
    "0",
    "1 makes the ranks of one engine compare, before each pass, what they are about to evaluate, "
    "and end the engine if they differ. For debugging: it costs an exchange per pass.",
    ("0", "1"),
    "switch",
)
PARK_DRAFTS = Variable(
    "VLLM_MOE_COMPAT_PARK_DRAFTS",
    "1",
    "0 verifies drafts of speculative decoding in every step. Otherwise they are left out for "
    "requests and sizes of the batch with which, as measured while serving, tokens come faster "
    "without.",
    ("0", "1"),
    "switch",
)
SMOKE_MODEL = Variable(
    "VLLM_MOE_COMPAT_SMOKE_MODEL",
    "",
    "Tests only: the checkpoint folder for tests/smoke; those tests are not selected without it.",
    kind="folder",
)
SMOKE_GOLDEN = Variable(
    "VLLM_MOE_COMPAT_SMOKE_GOLDEN",
    "",
    "Tests only: a JSON file {prompt, text, max_tokens} with the answer that tests/smoke expects.",
    kind="file",
)

VARIABLES: tuple[Variable, ...] = (
    ENABLED,
    BACKEND,
    DTYPE,
    QUANTIZE,
    EXPERT_CACHE,
    COLLECTIVES,
    CHECK_RANKS,
    PARK_DRAFTS,
    SMOKE_MODEL,
    SMOKE_GOLDEN,
)
