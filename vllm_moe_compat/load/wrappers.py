"""Look through wrappers that other libraries put around a function."""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any


def foreign_module(model: type, function: Any) -> str:
    """Return the module of ``function`` if it is not the class's own; empty otherwise."""
    code = getattr(function, "__code__", None)
    if code is None:
        return ""
    home = sys.modules.get(model.__module__)
    if code.co_filename == getattr(home, "__file__", code.co_filename):
        return ""
    return str(function.__globals__.get("__name__", code.co_filename))


def reaches(function: Any, wanted: Any) -> bool:
    """Whether ``function`` is ``wanted`` or wraps it, directly or through other wrappers.

    A wrapper holds the wrapped function in ``__wrapped__``, in a closure, in a default
    value or, if it is a partial object, in ``func``.
    """
    pending: list[Any] = [function]
    seen: set[int] = set()
    while pending and len(seen) < 100:
        candidate = pending.pop()
        if candidate is wanted:
            return True
        if id(candidate) in seen or not callable(candidate):
            continue
        seen.add(id(candidate))
        pending.append(getattr(candidate, "__wrapped__", None))
        pending.append(getattr(candidate, "func", None))
        if isinstance(candidate, FunctionType):
            pending.extend(candidate.__defaults__ or ())
            pending.extend((candidate.__kwdefaults__ or {}).values())
            for cell in candidate.__closure__ or ():
                try:
                    pending.append(cell.cell_contents)
                except ValueError:
                    continue
    return False
