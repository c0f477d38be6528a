"""Ctrl-C and polite requests to end: noticed between steps, so that nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

POLITE = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether somebody asked training to end. A second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def noticed() -> Iterator[StopRequest]:
    """Inside, SIGINT and SIGTERM request a stop. Signals are handled in the main thread only."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop._handle) for number in POLITE}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_back() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM wait. Processes that begin meanwhile have them blocked until ``ignore_in_worker``."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, POLITE)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_in_worker(worker: int) -> None:
    """In a process of DataLoader: SIGINT and SIGTERM are the trainer's, which lets its workers go when it ends.

    A terminal sends Ctrl-C to the whole process group, and service managers SIGTERM to every process. A worker that
    died of it would take the current step with it.
    """
    for number in POLITE:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, POLITE)
