"""A release rewritten by ``rewrite`` has the logits of transformers.

Each layout of the experts, as floats and in FP8 that is quantised anew, through the
plugin and mlx-lm.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch

import vllm_moe_compat
from parity.families import MOE
from parity.family import Family
from parity.forms import FORM_BY_NAME, applies, build
from parity.test_parity import check
from parity.verdict import judge
from support.cells import one_in
from support.checkpoints import Checkpoint
from support.loading import read
from support.rewriting import layout_to
from vllm_moe_compat.checkpoint.headers import read_headers
from vllm_moe_compat.families.registry import row_of_model_type
from vllm_moe_compat.plan.effective_config import effective_config
from vllm_moe_compat.rewrite.run_rewrite import rewrite
from vllm_moe_compat.rewrite.written_layout import LAYOUTS

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

# Made of these: floats, and powers of two as scales, of which FP8 loses nothing.
FLOATS, FP8 = FORM_BY_NAME["release"], FORM_BY_NAME["block FP8 E8M0"]
E8M0 = ("_scale", "_scale_inv")


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    vllm_moe_compat.apply()
    yield
    vllm_moe_compat.revert()


@pytest.mark.parametrize("family", one_in(3, MOE), ids=lambda family: family.name)
def test_every_layout_computes_the_same(family: Family, tmp_path: Path):
    for source, block in ((FLOATS, None), (FP8, None), (FP8, (32, 32))):
        if not applies(family, source):
            continue
        cell = build(family, source)
        folder = cell.write(_new(tmp_path))
        config = json.loads((folder / "config.json").read_text())
        row = row_of_model_type(config, mlx_lm.utils.MODEL_REMAPPING)
        assert row is not None
        fixed = effective_config(config).config
        for layout in LAYOUTS:
            form = layout_to(layout, block=block, e8m0=block is not None)
            headers = read_headers(folder)
            made = rewrite(read(folder), row, fixed, form, tensors=headers, dtype="float32")
            tensors = {name: _torch(name, array) for name, array in made}
            config.pop("quantization_config", None)
            if block is not None:
                entry = {"quant_method": "fp8", "weight_block_size": list(block)}
                config["quantization_config"] = entry
            written = Checkpoint(tensors, config).write(_new(tmp_path), shards=1)
            check(judge(written, cell.reference, family.tolerance), None)


def _new(folder: Path) -> Path:
    made = folder / str(len(list(folder.iterdir())))
    made.mkdir()
    return made


def _torch(name: str, array: mx.array) -> torch.Tensor:
    if array.dtype != mx.uint8:
        return torch.from_numpy(np.array(array.astype(mx.float32)))
    kind = torch.float8_e8m0fnu if name.endswith(E8M0) else torch.float8_e4m3fn
    return torch.from_numpy(np.array(array)).view(kind)


def test_families_come_in_both():
    assert sum(applies(family, FP8) for family in MOE) > len(MOE) // 2
