"""The training application: loop, checkpoints, samples, run folders, evaluation."""

from __future__ import annotations
