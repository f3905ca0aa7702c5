"""A rank with a range of a small model's layers, and the whole model by itself.

python -m support.rank_range FOLDER KIND    with MLX_RANK and MLX_HOSTFILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from support import models
from vllm_moe_compat.ranks import pipeline


def main(folder: str, kind: str) -> None:
    mx.set_default_device(mx.cpu)
    group = mx.distributed.init(strict=True, backend="ring")
    whole, _ = models.build_mlx(kind)
    model, _ = models.build_mlx(kind)
    layers, rank, size = len(model.layers), group.rank(), group.size()
    ends = [round(layers * number / size) for number in range(size + 1)]
    pipeline.keep_range(model, ends[rank], ends[rank + 1], pipeline.Neighbours(group))
    cache, own = make_prompt_cache(whole), make_prompt_cache(model)
    found = []
    for length in (5, 70, 1, 3, 1):
        tokens = mx.arange(7, 7 + length)[None]
        # As a prefill, whose logits nobody needs.
        model(tokens, cache=own)
        mx.eval([one.state for one in own], pipeline.given(model))
        whole(tokens, cache=cache)
        logits = model(tokens, cache=own)
        found.append(mx.array_equal(logits, whole(tokens, cache=cache)).item())
    Path(folder, f"{group.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
