"""The epilogue of a projection to heads: RMS normalization (QK-norm), then rotary embedding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class HeadEpilogue(NamedTuple):
    """Applied to projected heads: the first ``len(norms)`` parts are normalized, then the first ``rotated`` parts are
    rotated, if there are tables. Norms (D,); cos and sin (1|B, N, R / 2) with R <= D.
    """

    norms: tuple[Tensor, ...] = ()
    eps: float = 0.0
    cos: Tensor | None = None
    sin: Tensor | None = None
    rotated: int = 0
    interleaved: bool = False

    @property
    def is_identity(self) -> bool:
        return not self.norms and self.cos is None

    @property
    def parts(self) -> int:
        """Number of parts, from the first on, that are changed."""
        return max(len(self.norms), 0 if self.cos is None else self.rotated)

    def of_part(self, i: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Norm, cos and sin of part i."""
        norm = self.norms[i] if i < len(self.norms) else None
        return (norm, self.cos, self.sin) if i < self.rotated else (norm, None, None)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding (Su et al. 2021, section 3.2.2): x (B, H, N, D), tables (1|B, N, R / 2).

    Of the first R channels, (i, i + R / 2) are a pair, or (2 i, 2 i + 1) when ``interleaved``. Linear in x; the
    transposed map is the rotation by ``(cos, -sin)``.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated, rest = x.split([2 * cos.size(-1), x.size(-1) - 2 * cos.size(-1)], dim=-1)
    first, second = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, dim=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    shape = rotated.shape
    rotated = torch.stack(pair, dim=-1).reshape(shape) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((rotated, rest), dim=-1) if rest.size(-1) else rotated


def _rms_norm_backward(grad: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of y (B, H, N, D) and of the weight (D,)."""
    rstd = (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit, scaled = y * rstd, grad * weight
    return rstd * (scaled - unit * (scaled * unit).mean(-1, keepdim=True)), (grad * unit).sum((0, 1, 2))


def apply_to_part(
    part: Tensor, norm: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, interleaved: bool
) -> Tensor:
    """(B, H, N, D) normalized and rotated, computed in float32 where the part is narrower; differentiable."""
    upcast = part.float() if part.dtype.itemsize < 4 else part
    if norm is not None:
        upcast = torch.nn.functional.rms_norm(upcast, norm.shape, norm.to(upcast.dtype), eps)
    if cos is not None and sin is not None:
        upcast = rotary(upcast, cos, sin, interleaved)
    return upcast.to(part.dtype)


def part_backward(
    grad: Tensor,
    before: Tensor | None,
    norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the part ``before`` its epilogue and of its norm's weight."""
    upcast = grad.float() if grad.dtype.itemsize < 4 else grad
    grad_norm = None
    if cos is not None and sin is not None:
        upcast = rotary(upcast, cos, -sin, interleaved)
    if norm is not None and before is not None:
        upcast, grad_norm = _rms_norm_backward(upcast, before.to(upcast.dtype), norm.to(upcast.dtype), eps)
        grad_norm = grad_norm.to(norm.dtype)
    return upcast.to(grad.dtype), grad_norm


def apply(parts: list[Tensor], epilogue: HeadEpilogue) -> list[Tensor]:
    """All parts, (B, H, N, D) each, after the epilogue."""
    changed = [
        apply_to_part(part, *epilogue.of_part(i), epilogue.eps, epilogue.interleaved)
        for i, part in enumerate(parts[: epilogue.parts])
    ]
    return [*changed, *parts[epilogue.parts :]]


def apply_in_layout(parts: list[Tensor], epilogue: HeadEpilogue) -> list[Tensor]:
    """The same, in the memory layout of the parts."""
    changed = zip(apply(parts, epilogue), parts, strict=True)
    return [new if new.stride() == old.stride() else torch.empty_like(old).copy_(new) for new, old in changed]
