"""Functional interface. Shapes: B batch, H heads, N queries or tokens, M keys, C and E channels.

Each function runs a compiled kernel where there is one and PyTorch elsewhere (``fastgen.info()`` reports which,
``fastgen.use_backend`` selects), and supports autocast, ``torch.func`` transforms and ``torch.compile``. Each is twice
differentiable in reverse mode, with forward-mode AD; an unsupported derivative raises ``RuntimeError``. A bad argument
raises ``TypeError`` (its type or dtype) or ``ValueError`` (its shape, value or device) with its name.
"""

from __future__ import annotations

from fastgen.functional._overrides import refuse_script
from fastgen.functional.attention import scaled_dot_product_attention
from fastgen.functional.attention_jvp import scaled_dot_product_attention_jvp
from fastgen.functional.latent import reparameterize, reparameterize_kl
from fastgen.functional.packed import varlen_attention
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
    "scaled_dot_product_attention_jvp",
    "varlen_attention",
]

for _name in __all__:
    refuse_script(globals()[_name])
