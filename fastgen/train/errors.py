"""What can go wrong in a run, beyond files and data."""

from __future__ import annotations


class UsageError(ValueError):
    """An option that does not fit; the message names it, what was expected and what came."""


class DivergedError(RuntimeError):
    """The loss is no longer finite."""


class StoppedError(Exception):
    """Training ended early. ``epoch`` is the last whose checkpoint is kept, ``interrupted`` by Ctrl-C."""

    def __init__(self, reason: str, epoch: int, *, interrupted: bool) -> None:
        super().__init__(reason)
        self.epoch = epoch
        self.interrupted = interrupted
