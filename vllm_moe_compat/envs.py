"""Every environment variable that the package reads.

One table is the source: readers, documentation and the names that vLLM is told
about (it warns of unknown ``VLLM_*`` variables) all come from ``VARIABLES``.
Values are read at call time, so a test or a parent process can change them.
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
_instead: ContextVar[Mapping[str, str]] = ContextVar("vllm_moe_compat_environment", default=_NONE)


@contextmanager
def reading(values: Mapping[str, str]) -> Iterator[None]:
    """Have variables read as ``values`` inside, by this thread only; name → value."""
    token = _instead.set({**_instead.get(), **values})
    try:
        yield
    finally:
        _instead.reset(token)


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable.

    Attributes:
        name: of the variable.
        default: what unset and empty mean.
        doc: what it does, for the documentation.
        choices: the values that mean something; none where any may.
        kind: what a value is: ``switch``, ``choice``, ``folder`` or ``file``.
    """

    name: str
    default: str
    doc: str
    choices: tuple[str, ...] = ()
    kind: str = "choice"

    def read(self) -> str:
        """Return the value, or the default when unset or empty.

        Raises:
            SettingError: the value is none of the choices.
        """
        given = _instead.get().get(self.name, os.environ.get(self.name, ""))
        value = given.strip() or self.default
        if self.choices and value not in self.choices:
            raise SettingError(
                f"{self.name}={value!r} means nothing; set it to one of "
                f"{', '.join(self.choices)}, or unset it for {self.default!r}."
            )
        return value


ENABLED = Variable(
    "VLLM_MOE_COMPAT",
    "1",
    "0 switches the whole plugin off: nothing is patched, no platform is offered.",
    ("0", "1"),
    "switch",
)
BACKEND = Variable(
    "VLLM_MOE_COMPAT_BACKEND",
    "auto",
    "Who serves: auto (vllm-metal or vLLM's own kernels where they are, else the embedded MLX "
    "platform), embedded (ours, in any case), off (never ours).",
    ("auto", "embedded", "off"),
)
DTYPE = Variable(
    "VLLM_MOE_COMPAT_DTYPE",
    "auto",
    "What FP8 weights are dequantised to: auto (the serving dtype under vLLM; elsewhere bfloat16, "
    "or float32 on MLX's CPU device, whose gather_mm knows no other), bfloat16, float16, float32.",
    ("auto", "bfloat16", "float16", "float32"),
)
QUANTIZE = Variable(
    "VLLM_MOE_COMPAT_QUANTIZE",
    "none",
    "What weights are quantised to while they are loaded: none, 8bit (affine, group 64), mxfp8, "
    "6bit, 4bit. Each tensor goes straight to its packed form; there is no float copy of the "
    "model.",
    ("none", "8bit", "mxfp8", "6bit", "4bit"),
)
SMOKE_MODEL = Variable(
    "VLLM_MOE_COMPAT_SMOKE_MODEL",
    "",
    "Tests only: the checkpoint folder on which tests/smoke runs; unset, they are not selected.",
    kind="folder",
)
SMOKE_GOLDEN = Variable(
    "VLLM_MOE_COMPAT_SMOKE_GOLDEN",
    "",
    "Tests only: a JSON file {prompt, text, max_tokens} that the smoke tests expect.",
    kind="file",
)

VARIABLES: tuple[Variable, ...] = (
    ENABLED,
    BACKEND,
    DTYPE,
    QUANTIZE,
    SMOKE_MODEL,
    SMOKE_GOLDEN,
)
