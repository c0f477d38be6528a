"""Attention within the windows of Swin Transformers."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import functional


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None, *, dropout_p: float, scale: float
) -> Tensor:
    """Attention within windows, with a position bias and a mask for each window of an image.

    Without a mask the bias is broadcast over all windows. With one, the windows of an image are moved to the heads,
    so that the sum of bias and mask is broadcast over the images and never repeated for each.

    Args:
        query, key, value: (B * W, H, N, D), with the windows of an image adjacent.
        bias: (H, N, N), added to the scores.
        mask: (W, N, N), added to the scores; or None.

    Returns:
        (B * W, H, N, D).
    """
    if mask is None:
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias[None], dropout_p=dropout_p, scale=scale
        )
        return cast(Tensor, out)
    windows, heads = mask.size(0), query.size(1)
    query, key, value = (t.unflatten(0, (-1, windows)).flatten(1, 2) for t in (query, key, value))
    both = (mask[:, None] + bias).flatten(0, 1)[None]
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=both, dropout_p=dropout_p, scale=scale)
    merged: Tensor = cast(Tensor, out).unflatten(1, (windows, heads)).flatten(0, 1)
    return merged


def cosine_heads(query: Tensor, key: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys whose products are the scores of Swin Transformer V2: cosines times a learned temperature.

    Liu et al., "Swin Transformer V2: scaling up capacity and resolution" (2022), section 3.3. The temperature,
    exp(logit_scale) (H, 1, 1), at most 100, is folded into the queries, with its gradient. In float32 at least: the
    gradient of the temperature is a sum over all queries with little left.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    temperature = logit_scale.to(dtype).clamp(max=math.log(100.0)).exp()
    scaled = F.normalize(query.to(dtype), dim=-1) * temperature
    return scaled.to(query.dtype), F.normalize(key.to(dtype), dim=-1).to(key.dtype)
