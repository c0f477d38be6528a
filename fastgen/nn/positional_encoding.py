"""Sinusoidal positional encoding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgen import checks as check
from fastgen.nn._buffers import ComputedBuffers
from fastgen.nn._checks import require_base, require_nonnegative, require_positions

__all__ = ["PositionalEncoding"]


def _sinusoids(length: int, dim: int, base: float) -> Tensor:
    """Interleaved sin and cos of each position, (length, dim) in float64. An odd dim ends with a sin."""
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :dim]


class PositionalEncoding(ComputedBuffers):
    """Adds a sinusoidal positional encoding to tokens.

    Vaswani et al., "Attention is all you need" (2017), section 3.5: channel 2i of position p is
    ``sin(p / base^(2i / dim))``, channel 2i + 1 is the cosine of the same angle.

    The table is a non-persistent buffer: it is not in the state dict, and it is recomputed in float64 and rounded when
    the module changes its dtype.

    Shapes:
        - Input: (B, N, dim) with ``batch_first``, otherwise (N, B, dim).
        - Output: same as the input.

    Args:
        dim: number of channels of a token. If odd, the last channel is a sine.
        max_len: number of positions in the table.
        dropout: dropout probability of the sum in training, as in the paper.
        batch_first: whether the batch is dim 0 of the tokens; otherwise dim 1.
        base: base of the wavelengths, 10000 in the paper.

    Raises:
        ValueError: if a count is not positive, or ``dropout`` or ``base`` is out of range.

    Example:
        >>> PositionalEncoding(4)(torch.zeros(1, 2, 4))[0, 0]
        tensor([0., 1., 0., 1.])
    """

    table: Tensor

    def __init__(
        self,
        dim: int,
        max_len: int = 5000,
        dropout: float = 0.0,
        *,
        batch_first: bool = True,
        base: float = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check.require_positive("dim", dim)
        check.require_positive("max_len", max_len)
        check.require_probability("dropout", dropout)
        require_base(base)
        self.dim, self.max_len, self.batch_first, self.base = dim, max_len, batch_first, base
        self.dropout = nn.Dropout(dropout)
        self._register_computed(device, torch.get_default_dtype() if dtype is None else dtype)

    def _computed(self) -> dict[str, Tensor]:
        return {"table": _sinusoids(self.max_len, self.dim, self.base)}

    def extra_repr(self) -> str:
        return f"{self.dim}, max_len={self.max_len}, batch_first={self.batch_first}"

    def forward(self, x: Tensor, offset: int = 0, *, positions: Tensor | None = None) -> Tensor:
        """Adds the encoding to x.

        Args:
            x: tokens, (B, N, dim), or (N, B, dim) without ``batch_first``.
            offset: position of the first token, when the preceding tokens are in a cache.
            positions: integer positions (N,) or (B, N) on the device of x, used instead of ``offset``, such as
                ``KVCache.positions``. On a GPU, an out-of-range position is a device-side assertion.

        Returns:
            Tensor with the shape and dtype of x.

        Raises:
            TypeError: if x is not a floating-point tensor, or positions are not integers.
            ValueError: if x or positions have the wrong shape, or a position is negative or not below ``max_len``.
        """
        check.require_tensor("x", x)
        check.require_floating("x", x)
        if x.dim() != 3 or x.size(-1) != self.dim:
            layout = "(B, N, dim)" if self.batch_first else "(N, B, dim)"
            raise ValueError(f"x: expected {layout} with dim = {self.dim}, got {check.shape_of(x)}")
        batch, length = (x.size(0), x.size(1)) if self.batch_first else (x.size(1), x.size(0))
        if self.table.is_meta and not x.is_meta:  # loading a state dict does not materialize the table
            self._leave_meta(x.device)
        if positions is None:
            require_nonnegative("offset", offset)
            if offset + length > self.max_len:
                raise ValueError(
                    f"x: expected at most max_len = {self.max_len} positions, got {length} after offset {offset};"
                    " build the layer with a larger max_len"
                )
            table = self.table[offset : offset + length]
        else:
            require_positions(positions, batch, length)
            table = self._lookup(positions)
        if not self.batch_first:
            table = table.unsqueeze(1) if table.dim() == 2 else table.transpose(0, 1)
        result: Tensor = self.dropout(x + table.to(x.dtype))
        return result

    def _lookup(self, positions: Tensor) -> Tensor:
        index = positions.long()
        try:
            return self.table[torch.where(index < 0, self.max_len, index)]  # otherwise, -1 would index the last row
        except IndexError as error:
            raise ValueError(
                f"positions: expected 0 to max_len - 1 = {self.max_len - 1}, got {int(positions.min())} to"
                f" {int(positions.max())}"
            ) from error
