"""What ends a command."""

from __future__ import annotations

FAILURE, USAGE, INTERRUPTED = 1, 2, 130


class CommandError(Exception):
    """One line for the person at the keyboard, and the exit code."""

    def __init__(self, message: str, code: int = FAILURE) -> None:
        super().__init__(message)
        self.code = code
