"""fastgen in models that were written without it."""

from __future__ import annotations

from fastgen.integrations.modules import AccelerationReport, accelerate, restore

__all__ = ["AccelerationReport", "accelerate", "restore"]
