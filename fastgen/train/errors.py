"""What can go wrong in a run, beyond files and data."""

from __future__ import annotations


class UsageError(ValueError):
    """An option that does not fit; the message names it, what was expected and what came."""


class StoppedError(Exception):
    """Training ended early. ``step`` is that of the checkpoint that is kept (0: none), ``interrupted`` by a signal."""

    def __init__(self, reason: str, step: int, *, interrupted: bool) -> None:
        super().__init__(reason)
        self.step = step
        self.interrupted = interrupted
