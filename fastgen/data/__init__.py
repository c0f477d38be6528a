"""Data sets: read once, whole, into memory."""

from __future__ import annotations

from fastgen.data.images import ImageData, load_images

__all__ = ["ImageData", "load_images"]
