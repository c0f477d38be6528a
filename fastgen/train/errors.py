"""Errors of a run, beyond those of files and data."""

from __future__ import annotations


class UsageError(ValueError):
    """An invalid option; the message names it, what was expected and what was given."""


class StoppedError(Exception):
    """Training ended early. step: of the saved checkpoint (0: none). interrupted: by a signal."""

    def __init__(self, reason: str, step: int, *, interrupted: bool) -> None:
        super().__init__(reason)
        self.step = step
        self.interrupted = interrupted
