"""Progress of long work on the standard error stream: a bar on a terminal, a line per minute in a log file."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any

__all__ = ["progress_bar"]

_SECONDS = 60.0
"""Between two lines where the standard error stream is no terminal."""


class _Lines(io.TextIOBase):
    """Where tqdm would draw over its bar, a line of its own."""

    def write(self, text: str) -> int:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)
        return len(text)


class _Nothing(contextlib.nullcontext[Any]):
    """Takes what a bar takes."""

    def __enter__(self) -> Any:
        return self

    def update(self, n: int = 1) -> None:
        pass

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass


def progress_bar(desc: str, *, total: int | None, initial: int = 0, unit: str, show: bool = True) -> Any:
    """A tqdm bar; lines where the standard error stream is no terminal; nothing unless `show`, nor without tqdm."""
    if not show:
        return _Nothing()
    try:
        from tqdm import tqdm
    except ImportError:
        return _Nothing()
    options: dict[str, Any] = {"desc": desc, "total": total, "initial": initial, "unit": unit}
    if sys.stderr.isatty():
        return tqdm(**options)
    return tqdm(
        **options,
        file=_Lines(),
        mininterval=_SECONDS,
        miniters=1,  # a number that tqdm may not choose: its monitor would add lines
        bar_format="{desc}: {unit} {n_fmt}/{total_fmt}, {elapsed} elapsed, {remaining} left{postfix}",
    )
