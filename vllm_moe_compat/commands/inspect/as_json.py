"""An inspection as JSON; its form is ``schema.json`` beside this file."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from vllm_moe_compat.commands.inspect.model import Inspection


def render(found: Inspection) -> str:
    """Return one JSON object, in ASCII: it can be written to any terminal or file."""
    return json.dumps(asdict(found), indent=2) + "\n"


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) that ``render`` keeps to."""
    text = files("vllm_moe_compat.commands.inspect").joinpath("schema.json").read_text("utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded
