"""Errors of a command, and exit codes."""

from __future__ import annotations

FAILURE, USAGE, INTERRUPTED = 1, 2, 130


class CommandError(Exception):
    """A one-line message for the user, and the exit code."""

    def __init__(self, message: str, code: int = FAILURE) -> None:
        super().__init__(message)
        self.code = code
