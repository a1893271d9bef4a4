"""Ctrl-C, and SIGTERM, in the middle of work that has to be finished."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

__all__ = ["Interrupts"]


class Interrupts:
    """Ctrl-C while entered: kept back inside `held`, so that no state is saved from the middle of a step. So is SIGTERM
    where it is handled as Ctrl-C, as the command line does.

    Elsewhere it goes where it went before. Entered once a run, because to change the handler takes 0.1 ms.
    """

    def __init__(self) -> None:
        self.received = 0
        """How often it was pressed inside the `held` that is running."""
        self._kept: set[int] = set()
        """Which of the two signals came."""
        self._depth = 0
        self._before: dict[int, Any] = {}  # the handlers replaced

    def __enter__(self) -> Interrupts:
        self.received, self._kept = 0, set()
        if threading.current_thread() is threading.main_thread():  # only there do signals arrive
            handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            if callable(handlers[signal.SIGINT]) or handlers[signal.SIGINT] == signal.SIG_DFL:  # not ignored
                self._before[signal.SIGINT] = handlers[signal.SIGINT]
            if handlers[signal.SIGTERM] is signal.default_int_handler:
                self._before[signal.SIGTERM] = handlers[signal.SIGTERM]
        for number in self._before:
            signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._depth:
            self.received += 1
            self._kept.add(number)
            return
        before = self._before[number]
        if callable(before):
            before(number, frame)
        else:
            signal.signal(number, before)
            signal.raise_signal(number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if not self._depth:
            self._let_go()

    def between(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, and what is kept back by `held` before each of them, where the model is as it was."""
        for batch in batches:
            depth, self._depth = self._depth, 0
            try:
                self._let_go()
            finally:
                self._depth = depth
            yield batch

    def _let_go(self) -> None:
        kept, self._kept, self.received = self._kept, set(), 0
        for number in sorted(kept):  # each once, however often it came
            self._receive(number, None)
