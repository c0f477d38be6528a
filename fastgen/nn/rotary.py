"""Rotary position embedding (RoPE)."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastgen import checks as check
from fastgen import functional
from fastgen.nn._checks import require_base, require_nonnegative, require_positions

__all__ = ["RotaryEmbedding"]

Tables: TypeAlias = tuple[Tensor, Tensor]
"""cos and sin."""


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (RoPE) of queries and keys.

    Su et al., "RoFormer: enhanced Transformer with rotary position embedding" (2021), section 3.2.2: pair i of the
    channels at position p is rotated by the angle ``p * base^(-2i / dim)``, so that attention scores depend on relative
    positions only.

    The cos and sin tables are computed in float64 and rounded to float32 (float64 for float64 queries), whatever the
    dtype of the module. Tables for consecutive positions are cached. Positions may be negative. The layer has no
    parameters.

    Shapes:
        - Input: query (B, H, N, D) and key (B, Hk, N, D) with D >= dim.
        - Output: same as the inputs.

    Args:
        dim: number of channels of a head that are rotated, even. The remaining channels are unchanged.
        base: base of the wavelengths, 10000 in the paper. A larger base gives longer wavelengths.
        interleaved: if True, the pairs are channels (2i, 2i + 1), as in the paper; otherwise (i, i + dim / 2), as in
            Llama.
        scaling: divisor of the positions, to run a model on longer sequences than it was trained on (Chen et al.,
            "Extending context window of large language models via positional interpolation", 2023).

    Raises:
        ValueError: if ``dim`` is odd, or ``base`` or ``scaling`` is out of range.

    Example:
        >>> rotary = RotaryEmbedding(8)
        >>> query, key = rotary(torch.randn(2, 4, 5, 8), torch.randn(2, 1, 5, 8), offset=3)
        >>> query.shape, key.shape
        (torch.Size([2, 4, 5, 8]), torch.Size([2, 1, 5, 8]))
    """

    def __init__(self, dim: int, *, base: float = 10000.0, interleaved: bool = False, scaling: float = 1.0) -> None:
        super().__init__()
        check.require_positive("dim", dim)
        if dim % 2 != 0:
            raise ValueError(f"dim: expected an even number, got {dim}")
        require_base(base)
        if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or not 0 < scaling < math.inf:
            raise ValueError(f"scaling: expected a finite number > 0, got {scaling!r}")
        self.dim, self.base, self.interleaved, self.scaling = dim, base, interleaved, scaling
        self._cache: dict[tuple[torch.device, torch.dtype], Tables] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}, scaling={self.scaling}"

    def _compute(self, positions: Tensor, dtype: torch.dtype) -> Tables:
        exact = torch.float32 if positions.device.type == "mps" else torch.float64
        pairs = torch.arange(0, self.dim, 2, device=positions.device, dtype=exact)
        angles = positions.to(exact).unsqueeze(-1) * (self.base ** (-pairs / self.dim) / self.scaling)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def tables(
        self,
        length: int,
        offset: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tables:
        """Returns cos and sin tables for ``functional.rotary_embedding`` and ``functional.qkv_projection``.

        Args:
            length: number of positions.
            offset: first position.
            device: device of the tables. Default: ``torch.get_default_device()``.
            dtype: dtype of the tables; use float64 for float64 queries.

        Returns:
            cos and sin, (length, dim / 2) each. They are copies and may be modified.

        Raises:
            ValueError: if ``length`` or ``offset`` is negative.
        """
        device = torch.get_default_device() if device is None else torch.device(device)
        cos, sin = self._cached_tables(length, offset, device, dtype)
        return (cos, sin) if torch.compiler.is_compiling() else (cos.clone(), sin.clone())

    def _cached_tables(self, length: int, offset: int, device: torch.device, dtype: torch.dtype) -> Tables:
        """As ``tables``, but returns read-only views of the cache."""
        require_nonnegative("length", length)
        require_nonnegative("offset", offset)
        end = offset + length
        # The cache is bypassed in CUDA graph capture, because it may be replaced before a replay, and under dispatch
        # modes such as FakeTensorMode, which create tensors of their own.
        if (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack() > 0
            or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
        ):
            return self._compute(torch.arange(offset, end, device=device), dtype)
        tables = self._cache.get((device, dtype))
        if tables is None or tables[0].size(0) < end:
            size = 1 << (end - 1).bit_length() if end else 0
            with torch.inference_mode(False):  # so that training can use them later
                tables = self._compute(torch.arange(size, device=device), dtype)
            self._cache[device, dtype] = tables
        return tables[0][offset:end], tables[1][offset:end]

    def forward(
        self, query: Tensor, key: Tensor, *, offset: int = 0, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rotates queries and keys.

        Args:
            query: (B, H, N, D) with D >= dim.
            key: (B, Hk, N, D), at the same positions as query.
            offset: position of the first token, when the preceding tokens are in a cache.
            positions: integer positions (N,) or (B, N) on the device of query, used instead of ``offset``, such as
                ``KVCache.positions``.

        Returns:
            The rotated query and key, with the shapes and dtypes of the inputs.

        Raises:
            TypeError: if query or key is not a floating-point tensor, or positions are not integers.
            ValueError: if shapes do not match, or ``offset`` is negative.
        """
        for name, tensor in (("query", query), ("key", key)):
            check.require_tensor(name, tensor)
            check.require_floating(name, tensor)
            if tensor.dim() != 4 or tensor.size(-1) < self.dim:
                raise ValueError(
                    f"{name}: expected (B, H, N, D) with D >= dim = {self.dim}, got {check.shape_of(tensor)}"
                )
        if (query.size(0), query.size(2)) != (key.size(0), key.size(2)):
            raise ValueError(
                f"key: expected query's batch and length {(query.size(0), query.size(2))}, got {check.shape_of(key)}"
            )
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        if positions is None:
            cos, sin = self._cached_tables(query.size(2), offset, query.device, dtype)
        else:
            require_positions(positions, query.size(0), query.size(2))
            cos, sin = self._compute(positions, dtype)
        return (
            functional.rotary_embedding(query, cos, sin, interleaved=self.interleaved),
            functional.rotary_embedding(key, cos, sin, interleaved=self.interleaved),
        )
