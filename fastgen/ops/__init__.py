"""Raw operators, one file per family: schema, fake, PyTorch implementation, vmap rule. No autograd."""

from __future__ import annotations

from fastgen._library import load_compiled
from fastgen.ops import attention, latent, projection

__all__ = ["attention", "latent", "projection"]

load_compiled()  # now that the operators, for which the libraries have kernels, have their schemas
