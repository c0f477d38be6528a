"""fastgen: fused, twice-differentiable layers for generative models."""

from __future__ import annotations

from fastgen import functional, losses, ops
from fastgen._info import Info, info
from fastgen._library import current_backend, load_compiled, use_backend

__version__ = "0.1.0.dev0"

load_compiled()

__all__ = ["Info", "__version__", "current_backend", "functional", "info", "losses", "ops", "use_backend"]
