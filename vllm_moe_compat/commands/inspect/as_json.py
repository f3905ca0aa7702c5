"""Render an inspection as JSON; ``schema.json`` beside this file describes it."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from vllm_moe_compat.commands.inspect.model import Inspection


def render(found: Inspection) -> str:
    """Return one JSON object in ASCII, which any terminal or file can take."""
    return json.dumps(asdict(found), indent=2) + "\n"


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of ``render``'s output."""
    text = files("vllm_moe_compat.commands.inspect").joinpath("schema.json").read_text("utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded
