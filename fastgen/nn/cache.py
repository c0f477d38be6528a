"""Keys and values of the tokens that a decoder has seen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastgen import checks as check

__all__ = ["KVCache"]


class KVCache(nn.Module):
    """Keys and values of up to ``max_length`` tokens, in buffers that never move.

    Every step has the same shapes and reads its position from the device, so that ``torch.compile`` compiles one step
    and a CUDA graph replays it. For inference: keys that require grad are refused.

    Args:
        batch: B.
        num_kv_heads: Hk, heads of keys and values.
        max_length: M, prompt and generated tokens together.
        head_dim: Dk.
        value_dim: Dv; default Dk.
        window: how many tokens before its own a query sees; default all (``window=(window, 0)`` of
            ``functional.scaled_dot_product_attention``).
        device: of the buffers.
        dtype: of the buffers; keys and values have to have it. Under autocast that is the autocast dtype.

    The buffers are no part of a state dict; after ``to_empty`` the cache is empty. ``position`` is the number of tokens
    written, an integer tensor of one element on the device.

    What does not fit raises, from a count on the host. That count does not see compiled steps nor replays of a CUDA
    graph: there a position beyond the end is an error of the device (``index_copy_``).

    Raises:
        ValueError: a size that is not positive, or a negative window.

    Example:
        >>> cache = KVCache(2, num_kv_heads=1, max_length=16, head_dim=8)
        >>> query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 1, 5, 8), torch.randn(2, 1, 5, 8)
        >>> keys, values, mask = cache.update(key, value)
        >>> keys.shape, mask.shape
        (torch.Size([2, 1, 16, 8]), torch.Size([1, 1, 5, 16]))
        >>> functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True).shape
        torch.Size([2, 4, 5, 8])
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    padding: Tensor

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        window: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"batch": batch, "num_kv_heads": num_kv_heads, "max_length": max_length, "head_dim": head_dim}
        for name, size in {**sizes, "value_dim": value_dim}.items():
            check.require_positive(name, size)
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 0):
            raise ValueError(f"window: expected an integer >= 0, or None for unbounded, got {window!r}")
        self.max_length, self.window = max_length, window
        self._written = 0
        self._padded = False
        with torch.inference_mode(False):  # steps inside and outside of inference mode may write
            shape = (batch, num_kv_heads, max_length)
            self.register_buffer("keys", torch.zeros(*shape, head_dim, device=device, dtype=dtype), persistent=False)
            self.register_buffer("values", torch.zeros(*shape, value_dim, device=device, dtype=dtype), persistent=False)
            self.register_buffer("position", torch.zeros(1, device=device, dtype=torch.int64), persistent=False)
            self.register_buffer("padding", torch.zeros(batch, device=device, dtype=torch.int64), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KVCache:
        before = self.position, self.padding
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        counts = zip(before, (self.position, self.padding), strict=True)
        if any(_is_lost(old, new) for old, new in counts):
            for buffer in self.buffers():  # in memory as it came, of to_empty
                buffer.zero_()
            self._written, self._padded = 0, False
        return self

    def extra_repr(self) -> str:
        return f"keys={tuple(self.keys.shape)}, values={tuple(self.values.shape)}, window={self.window}"

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``update``."""
        return self.update(key, value)

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Writes the next N tokens.

        Args:
            key: (B, Hk, N, Dk), of the cache's dtype and device.
            value: (B, Hk, N, Dv).

        Returns:
            keys (B, Hk, M, Dk) and values (B, Hk, M, Dv), the buffers themselves, and a boolean mask
            (1, 1, N, M) for the queries of these tokens, (B, 1, N, M) where sequences are padded: True for tokens
            written up to the query's own, within the window and no padding. A query that is padding sees nothing.

        Raises:
            TypeError: another dtype. ValueError: another shape or device, or more tokens than there is room for.
            RuntimeError: key or value requires grad.
        """
        length = self._checked_length(key, value)
        if not torch.compiler.is_compiling():
            self._written += length
        index = self.position + torch.arange(length, device=self.position.device)
        self.keys.index_copy_(2, index, key)
        self.values.index_copy_(2, index, value)
        self.position.add_(length)
        return self.keys, self.values, self._mask(index)

    def positions(self, length: int) -> Tensor:
        """Positions of the next ``length`` tokens in their sequences, for encodings: (N,), or (B, N) where padded.

        Padding does not count, and has position 0.

        Raises:
            ValueError: a length that is not positive.
        """
        check.require_positive("length", length)
        index = self.position + torch.arange(length, device=self.position.device)
        return (index - self.padding.unsqueeze(1)).clamp(min=0) if self._padded else index

    def reset(self, padding: Tensor | None = None) -> None:
        """Forgets all tokens.

        Args:
            padding: (B,) integers, how many tokens each sequence of the coming prompt is padded with on its left.

        Raises:
            TypeError: padding is no integer tensor. ValueError: it has another shape or device, or is negative, which
                on a GPU is an error of the device.
        """
        check.require_tensor("padding", padding, optional=True)
        if padding is not None:
            if padding.is_floating_point() or padding.dtype == torch.bool:
                raise TypeError(f"padding: expected an integer tensor, got {padding.dtype}")
            check.require_shape("padding", padding, tuple(self.padding.shape), "(B,)")
            self._require_device("padding", padding)
            _require_not_negative(padding)
        self._written, self._padded = 0, padding is not None
        self.position.zero_()
        self.padding.zero_() if padding is None else self.padding.copy_(padding)

    def reorder(self, indices: Tensor) -> None:
        """Sequence b goes on as sequence ``indices[b]`` was, as beam search needs it.

        Args:
            indices: (B,) integers.

        Raises:
            TypeError: indices is no integer tensor. ValueError: it has another shape or device.
        """
        check.require_tensor("indices", indices)
        if indices.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"indices: expected an integer tensor, int32 or int64, got {indices.dtype}")
        check.require_shape("indices", indices, tuple(self.padding.shape), "(B,)")
        self._require_device("indices", indices)
        for buffer in (self.keys, self.values, self.padding):
            buffer.copy_(buffer.index_select(0, indices))

    def _mask(self, index: Tensor) -> Tensor:
        key = torch.arange(self.max_length, device=index.device)
        query = index.unsqueeze(1)
        mask = key <= query
        if self.window is not None:
            mask = mask & (key >= query - self.window)
        if self._padded:
            return (mask & (key >= self.padding[:, None, None])).unsqueeze(1)
        return mask[None, None]

    def _require_device(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.keys.device:
            raise ValueError(f"{name}: expected the device of the cache, {self.keys.device}, got {tensor.device}")

    def _checked_length(self, key: Tensor, value: Tensor) -> int:
        for name, tensor, buffer in (("key", key, self.keys), ("value", value, self.values)):
            check.require_tensor(name, tensor)
            batch, heads, _, dim = buffer.shape
            if tensor.dim() != 4 or (*tensor.shape[:2], tensor.size(3)) != (batch, heads, dim):
                raise ValueError(f"{name}: expected ({batch}, {heads}, N, {dim}), got {check.shape_of(tensor)}")
            if tensor.dtype != buffer.dtype:
                raise TypeError(
                    f"{name}: expected the dtype of the cache, {buffer.dtype}, got {tensor.dtype}; build it with"
                    f" dtype={tensor.dtype}"
                )
            self._require_device(name, tensor)
            if torch.is_grad_enabled() and tensor.requires_grad:
                raise RuntimeError(
                    f"{name}: expected a tensor that does not require grad, since a cache is written in place; generate"
                    " under torch.no_grad() or torch.inference_mode(), and train without a cache"
                )
        length = key.size(2)
        if value.size(2) != length:
            raise ValueError(f"value: expected key's length {length}, got {value.size(2)}")
        if not torch.compiler.is_compiling() and self._written + length > self.max_length:
            raise ValueError(
                f"key: expected at most {self.max_length - self._written} more tokens, the rest of max_length ="
                f" {self.max_length}, got {length}; build a longer cache, or call reset()"
            )
        return length


def _is_lost(old: Tensor, new: Tensor) -> bool:
    """Whether what a buffer held is not there after it was given other memory."""
    if old is new or new.is_meta or type(new) is not Tensor:
        return False
    return old.is_meta or old.tolist() != new.tolist()


def _require_not_negative(padding: Tensor) -> None:
    right = (padding >= 0).all()
    if torch.compiler.is_compiling() or padding.device.type != "cpu":
        torch._assert_async(right, "padding: expected counts >= 0")
    elif not right:
        raise ValueError(f"padding: expected counts >= 0, got {int(padding.min())}")
