"""Root mean squares whose sums of squares do not overflow in half precision."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """float32 at least, whatever autocast chose. In float16 the square of 256 is infinite, and 1e-8 is 0."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean over dim 1 + eps), which stays as a dim of 1, in the dtype of x."""
    return torch.rsqrt(widened(x).square().mean(dim=1, keepdim=True) + eps).to(x.dtype)
