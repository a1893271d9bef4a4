"""Checks of arguments, with the same message everywhere: the argument, what is allowed, and what came."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from numbers import Integral

__all__ = ["at_least", "nearest", "one_of"]


def at_least(minimum: int, **arguments: int) -> None:
    """ValueError where an argument is not a whole number, or less than the minimum."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < minimum:
            raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}")


def one_of(known: Collection[str], **arguments: str) -> None:
    """ValueError where an argument is not a known name; it tells which one is meant."""
    for name, value in arguments.items():
        if not isinstance(value, str) or value not in known:
            near = nearest(str(value), known)
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}, did you mean {near!r}?")


def nearest(name: str, names: Collection[str]) -> str:
    """The one of `names` that looks most like `name`, whatever its case."""
    by_lower = {known.lower(): known for known in names}
    return by_lower[difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.0)[0]]
