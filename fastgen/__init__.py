"""fastgen: fused, twice-differentiable layers for generative models."""

from __future__ import annotations

from fastgen import functional, losses, ops
from fastgen._info import Info, info
from fastgen._library import current_backend, load_compiled, use_backend
from fastgen.integrations import AccelerationReport, accelerate, restore

__version__ = "0.1.0.dev0"

load_compiled()

__all__ = [
    "AccelerationReport",
    "Info",
    "__version__",
    "accelerate",
    "current_backend",
    "functional",
    "info",
    "losses",
    "ops",
    "restore",
    "use_backend",
]
