"""Ctrl-C and polite requests to end: noticed between steps, so that nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

POLITE = (signal.SIGINT, signal.SIGTERM)


class Wish:
    """Whether somebody asked training to end. A second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def noticed() -> Iterator[Wish]:
    """Inside, SIGINT and SIGTERM set the wish. Only the main thread may ask for signals; elsewhere nothing changes."""
    wish = Wish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = {number: signal.signal(number, wish._handle) for number in POLITE}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
