"""Activations of MLPs and experts as the config says.

mlx-lm's modules have their family's activation written into the code. The MLPs of an instance
are told apart by their projections; a class that computes the same with another activation takes
their place. Projections stay where they are, so names and quantisation do too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families.fixes.fix import ForwardFix, Settings, become, named
from vllm_moe_compat.families.fixes.rotary_frequencies import is_transformers

SAME: Mapping[str, str] = {
    **{name: name for name in ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu")},
    **{name: name for name in ("relu", "relu2", "sigmoid", "tanh", "linear", "xielu")},
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_pytorch_tanh",
}
"""transformers' names of activations → one name for each function."""
_KEYS = ("hidden_activation", "hidden_act", "mlp_hidden_act")
_TOWERS = ("vision", "visual", "audio")


def activation_fix(own: str = "silu", *, fixed: bool = False) -> ForwardFix:
    """Return the fix for a module.

    Args:
        own: the activation in its code.
        fixed: whether no other one can be put in, since it is used in more than MLPs.
    """

    def given(settings: Settings) -> str | None:
        return next((settings[key] for key in _KEYS if settings.get(key) is not None), None)

    def needed(settings: Settings) -> str | None:
        name = given(settings)
        if name is None or SAME.get(name) == own or not is_transformers(settings):
            return None
        if fixed or name not in SAME or SAME[name] == "xielu" or own == "xielu":
            raise UnsupportedCheckpointError(
                f"config.json: the activation is {name!r}, where mlx-lm's module computes {own!r} "
                "and no other can be put in; correct the config, or serve the checkpoint with "
                "another engine."
            )
        return f"activation {name} in place of {own}"

    def apply(model: Any, settings: Settings) -> None:
        name = given(settings)
        assert name is not None, "the fix is needed"
        function, changed = _function(SAME[name]), 0
        for path, part in model.named_modules():
            if not any(tower in path for tower in _TOWERS):
                changed += _put_in(part, function)
        if not changed:
            raise UnsupportedCheckpointError(
                f"config.json: the activation is {name!r}, and {type(model).__module__} has no MLP "
                "that it could be put into; report the checkpoint."
            )

    return ForwardFix(
        "activation",
        "the module computes its family's activation, whatever the config says",
        _KEYS,
        needed,
        apply,
    )


Function = Callable[[Any], Any]


def _function(name: str) -> Function:
    """Return the activation on ``mx.array``s."""
    import mlx.core as mx
    import mlx.nn as nn

    functions: dict[str, Function] = {
        "silu": nn.silu,
        "gelu": nn.gelu,
        "gelu_pytorch_tanh": nn.gelu_approx,
        "quick_gelu": lambda x: x * mx.sigmoid(1.702 * x),
        "relu": nn.relu,
        "relu2": nn.relu2,
        "sigmoid": mx.sigmoid,
        "tanh": mx.tanh,
        "linear": lambda x: x,
    }
    return functions[name]


def _put_in(part: Any, function: Function) -> bool:
    """Give a module the activation if it is an MLP or stacked experts; return whether it is."""
    children = set(part.children()) if hasattr(part, "children") else set()
    if {"up_proj", "gate_proj", "down_proj"} <= children and hasattr(part, "activation"):
        part.activation = lambda x, gate: function(gate) * x  # SwitchGLU
    elif {"fc1", "fc2"} <= children and hasattr(part, "activation"):
        part.activation = function  # SwitchMLP
    elif (forward := _forward(children, function)) is not None:
        become(part, lambda original: _with_forward(original, forward))
    else:
        return False
    return True


def _forward(children: set[str], function: Function) -> Callable[[Any, Any], Any] | None:
    """Return the forward pass of an MLP by the names of its projections; None for others."""
    import mlx.core as mx

    names = next((names for names in _PROJECTIONS if set(names) <= children), None)
    if names is None:
        return None
    *ups, down = names

    def forward(mlp: Any, x: Any) -> Any:
        parts = [mlp[up](x) for up in ups]
        if ups == ["gate_up_proj"]:
            parts = list(mx.split(parts[0], 2, axis=-1))
        hidden = function(parts[0])
        return mlp[down](hidden if len(parts) == 1 else hidden * parts[1])

    return forward


_PROJECTIONS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("gate_up_proj", "down_proj"),
    ("up_proj", "down_proj"),
    ("c_fc", "c_proj"),
)
"""Projections of MLPs, the activated one first; ``gate_up_proj`` is two of them."""


def _with_forward(original: type, forward: Callable[[Any, Any], Any]) -> type:
    class Mlp(original):  # type: ignore[misc]
        __call__ = forward

    return named(Mlp, original)
