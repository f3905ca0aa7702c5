"""A rank that compares what it is about to evaluate with the others.

python -m support.rank_order FOLDER    with MLX_RANK and MLX_HOSTFILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from vllm_moe_compat.ranks.order_check import OrderCheck
from vllm_moe_compat.ranks.same_tokens import RanksDisagreeError


def attempt(check: OrderCheck, kind: str, facts: dict[str, Any]) -> str:
    try:
        check.agree(kind, facts)
    except RanksDisagreeError as error:
        return str(error)
    return ""


def main(folder: str) -> None:
    mx.set_default_device(mx.cpu)
    group = mx.distributed.init(strict=True, backend="ring")
    last = group.rank() == group.size() - 1
    facts = {"requests": ["a", "b"], "tokens": np.arange(4).reshape(2, 2)}
    swapped = facts | {"tokens": facts["tokens"][::-1]}
    found = {}
    check = OrderCheck(group)
    check.begin_step()
    found["the same"] = attempt(check, "pass", facts) + attempt(check, "tokens", facts)
    found["tokens"] = attempt(check, "pass", swapped if last else facts)
    found["kind"] = attempt(check, "tokens" if last else "pass", facts)
    if last:
        check.count += 1
    found["count"] = attempt(check, "pass", facts)
    check.begin_step()
    if last:
        check.begin_step()
    found["step"] = attempt(check, "pass", facts)
    Path(folder, f"{group.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
