"""Use of fastgen's layers in existing PyTorch models."""

from __future__ import annotations

from fastgen.integrations.modules import AccelerationReport, accelerate, restore

__all__ = ["AccelerationReport", "accelerate", "restore"]
