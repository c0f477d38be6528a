"""The training application: loop, checkpoints, pictures, run folders."""

from __future__ import annotations
