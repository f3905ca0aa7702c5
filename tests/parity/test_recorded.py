"""The package's probes expect what transformers computes."""

from __future__ import annotations

import copy
import json
from importlib import resources
from typing import Any

import numpy as np
import pytest

from parity import recorded
from vllm_moe_compat import probes as upstream

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

NAMES = (*recorded.NAMES, *recorded.OWN)
STALE = "run scripts/docs/probes"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    text = resources.files(upstream).joinpath("families.json").read_text()
    return dict(json.loads(text))


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")


def test_every_family_is_recorded(found: dict[str, Any]):
    assert list(found) == list(NAMES), STALE


@pytest.mark.parametrize("name", NAMES)
def test_tensors_and_configs_are_the_recorded_ones(name: str, found: dict[str, Any]):
    entry = copy.deepcopy(found[name])
    for part in ("release", "library"):
        entry.get(part, {}).pop("logits", None)
    assert json.loads(json.dumps(recorded.entry(name, logits=False))) == entry, STALE


@pytest.mark.parametrize("name", NAMES[::9])
def test_logits_are_the_recorded_ones(name: str, found: dict[str, Any]):
    entry = recorded.entry(name)
    for part in ("release", "library"):
        if part in entry:
            expected = np.array(found[name][part]["logits"])
            scale = np.abs(expected).max()
            assert np.abs(entry[part]["logits"] - expected).max() < 1e-5 * scale, STALE
