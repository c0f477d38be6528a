"""The user-facing functions. Shapes: B batch, H heads, N queries or tokens, M keys, C and E channels.

Each takes a compiled kernel where there is one, PyTorch elsewhere (``fastgen.info()`` says which,
``fastgen.use_backend`` chooses), honours autocast, ``torch.func`` transforms and ``torch.compile``, and is
differentiable twice and in forward mode; a derivative that is not there raises. Bad arguments raise ``TypeError``
(a dtype, not a tensor) or ``ValueError`` (a shape, a value, a device) with the argument's name.
"""

from __future__ import annotations

from fastgen.functional.attention import scaled_dot_product_attention
from fastgen.functional.latent import reparameterize, reparameterize_kl
from fastgen.functional.projection import (
    merge_heads_projection,
    multi_head_projection,
    qkv_projection,
    rotary_embedding,
)

__all__ = [
    "merge_heads_projection",
    "multi_head_projection",
    "qkv_projection",
    "reparameterize",
    "reparameterize_kl",
    "rotary_embedding",
    "scaled_dot_product_attention",
]
