"""Wrappers around functions of mlx-lm, and the table of those that are installed.

Another library may wrap the same function, earlier or later, and so may we again, over its
wrapper. The table therefore maps (owner, name) to a stack of patches, the innermost first.
Taking a patch out restores the function below it where its wrapper is the outermost, and
otherwise makes the wrapper pass its calls through.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from vllm_moe_compat.load.wrappers import reaches

Key = tuple[Any, str]


@dataclass(slots=True, eq=False)
class Patch:
    """One wrapper that was installed.

    Attributes:
        owner: the class or module that holds the function.
        name: the attribute of ``owner``.
        hook: called in place of the function, with the owner and ``call`` first.
        original: the function in ``owner``'s own namespace; None where it is inherited or
            missing.
        active: whether the wrapper runs its hook or passes calls through.
        wrapper: the installed function.
    """

    owner: Any
    name: str
    hook: Callable[..., Any]
    original: Any
    active: bool = True
    wrapper: Any = None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function below the wrapper; an inherited method is looked up anew."""
        if self.original is not None:
            return self.original(*args, **kwargs)
        inherited = getattr(super(self.owner, args[0]), self.name, None)
        if inherited is None:
            return _return_weights(*args, **kwargs)
        return inherited(*args[1:], **kwargs)

    @property
    def outermost(self) -> bool:
        """Whether callers reach our wrapper before any other."""
        return vars(self.owner).get(self.name) is self.wrapper

    @property
    def in_place(self) -> bool:
        """Whether calls reach our wrapper, directly or through other wrappers."""
        return reaches(vars(self.owner).get(self.name), self.wrapper)


class PatchTable:
    """The installed patches; not locked."""

    def __init__(self) -> None:
        self._stacks: dict[Key, list[Patch]] = {}

    def get(self, owner: Any, name: str) -> Patch | None:
        """Return the patch that calls reach first; a displaced one if they reach none."""
        stack = self._stacks.get((owner, name), [])
        reached = [patch for patch in reversed(stack) if patch.in_place]
        return next(iter(reached or stack), None)

    def active(self) -> set[Key]:
        """Return the functions with an active patch."""
        return {key for key, stack in self._stacks.items() if any(p.active for p in stack)}

    def install(self, owner: Any, name: str, hook: Callable[..., Any]) -> None:
        """Wrap a function, unless calls reach a wrapper of ours already, which acts again."""
        stack = self._stacks.setdefault((owner, name), [])
        for patch in stack:
            patch.active = patch.in_place
        if not any(patch.active for patch in stack):
            stack.append(_wrapped(owner, name, hook))

    def bring_out(self, owner: Any, name: str) -> None:
        """Wrap an installed function once more if another library's wrapper is over ours.

        The hook must let the inner call pass, as ``sanitize_hook`` does.
        """
        stack = self._stacks[owner, name]
        if not any(patch.outermost for patch in stack):
            stack.append(_wrapped(owner, name, stack[-1].hook))

    def uninstall(self, keep: Collection[Key] = ()) -> None:
        """Take every patch out, except those of the functions in ``keep``."""
        for key, stack in list(self._stacks.items()):
            if key in keep:
                continue
            for patch in reversed(list(stack)):
                patch.active = False
                if patch.outermost:
                    _restore(patch)
                    stack.remove(patch)
            if not stack:
                del self._stacks[key]


def _wrapped(owner: Any, name: str, hook: Callable[..., Any]) -> Patch:
    fresh = Patch(owner, name, hook, vars(owner).get(name))

    @functools.wraps(getattr(owner, name, _return_weights))
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not fresh.active:
            return fresh.call(*args, **kwargs)
        return hook(fresh.owner, fresh.call, *args, **kwargs)

    fresh.wrapper = wrapper
    setattr(owner, name, wrapper)
    return fresh


def _restore(patch: Patch) -> None:
    if patch.original is None:
        delattr(patch.owner, patch.name)
    else:
        setattr(patch.owner, patch.name, patch.original)


def _return_weights(model: Any, weights: Any) -> Any:
    """Stand in for ``sanitize`` in a class that has none: the weights stay as they are."""
    return weights
