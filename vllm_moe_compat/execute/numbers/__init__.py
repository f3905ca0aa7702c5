"""Run the operations of stored number forms on MLX arrays.

There is one file per form, as in ``checkpoint/numbers``. ``EXECUTORS`` lists them.
"""

from __future__ import annotations

from vllm_moe_compat.checkpoint.operations import Op
from vllm_moe_compat.execute.numbers import fp4, fp8, ints
from vllm_moe_compat.execute.numbers.executor import Executor

EXECUTORS: dict[type[Op], Executor] = {**fp8.EXECUTORS, **ints.EXECUTORS, **fp4.EXECUTORS}


def executor_of(op: Op) -> Executor:
    """Return the executor of an operation of a stored number form.

    Raises:
        TypeError: no executor is listed for it.
    """
    executor = EXECUTORS.get(type(op))
    if executor is None:
        raise TypeError(f"{type(op).__name__} has no entry in execute.numbers.EXECUTORS")
    return executor
