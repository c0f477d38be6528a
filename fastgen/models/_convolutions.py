"""Names that the image-to-image models import."""

from __future__ import annotations

from fastgen.models.dcgan import init_weights as initialise

__all__ = ["SLOPE", "initialise"]

SLOPE = 0.2
