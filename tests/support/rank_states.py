"""A rank that holds a part of several families' layers and records the states of its part.

python -m support.rank_states FOLDER FAMILY…    with MLX_RANK and MLX_HOSTFILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

import vllm_moe_compat
from support.rank_logits import place_of
from support.state_families import Caches, step_by_step
from vllm_moe_compat.backend.model.state_recording import StateRecording
from vllm_moe_compat.load.options import loading_with
from vllm_moe_compat.ranks.share import Share

IDS = np.asarray([[3, 7, 11, 2, 9, 4, 8]])
PROMPT = 3


def compare(folder: Path, name: str, group: mx.distributed.Group) -> dict[str, Any]:
    """Return how many arrays of states a recorded pass has wrong, of how many."""
    place = place_of(folder, name, group.rank())
    share = Share(place, group)
    with loading_with(arrange=share):
        model, _ = load_model(place)
    recording = StateRecording(model)
    ours, theirs = Caches(model), Caches(model)
    for caches in (ours, theirs):
        mx.eval(model(mx.array(IDS[:, :PROMPT]), cache=caches.made), caches.states)
    rest = mx.array(IDS[:, PROMPT:])
    expected = step_by_step(model, theirs, rest)
    with_state = recording.caches(ours.states, np.asarray([rest.shape[1]]))
    with recording.during():
        logits = model(rest, cache=ours.replaced(with_state))
    found = recording.by_position(with_state)
    mx.eval(logits, [layer.held for layer in found])
    equal = [
        bool(mx.array_equal(part, expected[count - 1][number][index]).item())
        for number, layer in enumerate(found)
        for count in range(1, rest.shape[1] + 1)
        for index, part in enumerate(layer.after([0], [count]))
    ]
    cut = len(model.layers) - len(share.cutting.whole)
    return {
        "unsupported": recording.unsupported,
        "wrong": equal.count(False),
        "compared": len(equal),
        "cut": cut,
    }


def main() -> None:
    folder = Path(sys.argv[1])
    group = mx.distributed.init(strict=True, backend="ring")
    with vllm_moe_compat.applied():
        found = {name: compare(folder, name, group) for name in sys.argv[2:]}
    (folder / f"{group.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
