"""Raw operators, one file per family: schema, fake, PyTorch implementation, vmap rule. No autograd."""

from __future__ import annotations

from fastgen.ops import attention, latent, projection

__all__ = ["attention", "latent", "projection"]
