"""The key-value cache of autoregressive decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from fastgen import checks as check

__all__ = ["KVCache"]

Position = TypeVar("Position", int, Tensor)


class KVCache(nn.Module):
    """Preallocated keys and values of up to ``max_length`` tokens, for inference.

    ``update`` returns whole buffers and a mask: every step has the same shapes and reads its position from the device,
    so that ``torch.compile`` compiles one step and a CUDA graph replays it. ``append`` is for eager decoding: it
    returns only the tokens that can be attended to, so that most steps need no mask (``mask``), and ``make_room`` drops
    tokens beyond a window or segment, so that a text may be longer than the cache.

    Args:
        batch: B.
        num_kv_heads: Hk, heads of keys and values.
        max_length: M, prompt and generated tokens together.
        head_dim: Dk.
        value_dim: Dv; default Dk.
        window: number of tokens before its own that a query attends to; default all (``window=(window, 0)`` of
            ``functional.scaled_dot_product_attention``).
        segment: length of the segments of a text of which a query attends to its own and the previous one (Dai et al.,
            "Transformer-XL", 2019), in place of a window.
        device: device of the buffers.
        dtype: dtype of the buffers, keys and values. Under autocast, pass the autocast dtype.

    The buffers are not part of a state dict; after ``to_empty`` the cache is empty. ``position`` is the number of
    tokens in the cache, an integer tensor of one element on the device.

    Tokens that do not fit raise an error, by a count kept on the host. Compiled steps and CUDA graph replays do not
    increment that count: there, a position beyond the end is a device-side error (``index_copy_``), and ``append`` can
    be used again only after ``reset``.

    Raises:
        ValueError: a size that is not positive, a negative window, or both window and segment.

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
        segment: int | None = None,
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
        if segment is not None:
            check.require_positive("segment", segment)
            if window is not None:
                raise ValueError(f"window: expected None with segment = {segment}, got {window}")
        self.max_length, self.window, self.segment = max_length, window, segment
        self._written = 0  # tokens in the buffers
        self._dropped = 0  # tokens that were there before them
        self._padded = False
        with torch.inference_mode(False):  # so that steps inside and outside of inference mode may write
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
            for buffer in self.buffers():  # to_empty leaves them uninitialized
                buffer.zero_()
            self._written, self._dropped, self._padded = 0, 0, False
        return self

    def extra_repr(self) -> str:
        bound = f"segment={self.segment}" if self.segment is not None else f"window={self.window}"
        return f"keys={tuple(self.keys.shape)}, values={tuple(self.values.shape)}, {bound}"

    @property
    def num_tokens(self) -> int:
        """Number of tokens written since the last reset, padding and dropped ones included; counted on the host."""
        return self._dropped + self._written

    @property
    def room(self) -> int:
        """Number of tokens that ``make_room`` can provide for at once."""
        reach = self._reach
        return self.max_length - (self._written if reach is None else min(self._written, reach))

    @property
    def _reach(self) -> int | None:
        """Largest distance to a key that a query may attend to; None: unbounded."""
        return self.window if self.segment is None else 2 * self.segment - 1

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``update``."""
        return self.update(key, value)

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Writes the next N tokens.

        Args:
            key: (B, Hk, N, Dk), in dtype and device of the cache.
            value: (B, Hk, N, Dv).

        Returns:
            keys (B, Hk, M, Dk) and values (B, Hk, M, Dv), the buffers themselves, and a boolean mask
            (1, 1, N, M) for the queries of these tokens, (B, 1, N, M) where sequences are padded: True for tokens
            that are written, not after the query's own, within the window or segments, and not padding. Queries of
            padding are fully masked.

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
        return self.keys, self.values, self._mask(torch.arange(self.max_length, device=index.device), index)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """``update`` for eager decoding. The mask is that which ``mask(N)`` returned before.

        Returns:
            keys (B, Hk, n, Dk) and values (B, Hk, n, Dv), the part of the buffers that these tokens may attend to.

        Raises:
            As ``update``; RuntimeError also in compiled code.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError("append: expected an eager call, since its shapes grow; compiled code calls update")
        self._checked_length(key, value)
        return self._append(key, value)

    def _append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """``append`` without checks, whose cost matters for single tokens."""
        first, begin, length = self._first_slot(), self._written, key.size(2)
        self._written = end = begin + length
        buffers = cast("dict[str, Tensor]", self._buffers)  # faster than attributes of a module
        keys, values = buffers["keys"], buffers["values"]
        keys.narrow(2, begin, length).copy_(key)
        values.narrow(2, begin, length).copy_(value)
        buffers["position"].add_(length)
        return keys.narrow(2, first, end - first), values.narrow(2, first, end - first)

    def mask(self, length: int) -> Tensor | None:
        """Mask of the next ``length`` tokens for what ``append`` will return, in eager code.

        Returns:
            A boolean mask as that of ``update``; None where nothing is masked: for one token of unpadded sequences.
            All caches of a model have the same one.
        """
        if length == 1 and not self._padded:
            return None
        places = torch.arange(self._first_slot(), self._written + length, device=self.keys.device)
        return self._mask(places, places[-length:])

    def make_room(self, length: int) -> None:
        """Drops the oldest tokens, beyond window or segments, if ``length`` more do not fit. To be called eagerly.

        Raises:
            ValueError: more tokens than the cache can hold beside those that they may attend to.
        """
        if self._written + length <= self.max_length:
            return
        if length > self.room:
            raise ValueError(
                f"length: expected at most {self.room} tokens at once, in a cache of {self.max_length}, got {length}"
            )
        kept = min(self._written, self._reach or 0)
        dropped = self._written - kept
        for buffer in (self.keys, self.values):
            buffer[:, :, :kept] = buffer[:, :, dropped : self._written].clone()
        self.position.sub_(dropped)
        self.padding.sub_(dropped)
        self._written, self._dropped = kept, self._dropped + dropped

    def positions(self, length: int) -> Tensor:
        """Positions of the next ``length`` tokens in their sequences, for encodings: (N,), or (B, N) where padded.

        Padding is not counted, and has position 0.

        Raises:
            ValueError: a length that is not positive.
        """
        check.require_positive("length", length)
        index = self.position + torch.arange(length, device=self.position.device)
        return self._place(index).clamp(min=0) if self._padded else self._place(index)

    def reset(self, padding: Tensor | None = None) -> None:
        """Empties the cache.

        Args:
            padding: (B,) integers, the number of padding tokens on the left of each sequence of the coming prompt.

        Raises:
            TypeError: padding is not an integer tensor. ValueError: it has another shape or device, or is negative,
                which on a GPU is a device-side error.
        """
        check.require_tensor("padding", padding, optional=True)
        if padding is not None:
            if padding.is_floating_point() or padding.dtype == torch.bool:
                raise TypeError(f"padding: expected an integer tensor, got {padding.dtype}")
            check.require_shape("padding", padding, tuple(self.padding.shape), "(B,)")
            self._require_device("padding", padding)
            _require_not_negative(padding)
        self._written, self._dropped, self._padded = 0, 0, padding is not None
        self.position.zero_()
        self.padding.zero_() if padding is None else self.padding.copy_(padding)

    def reorder(self, indices: Tensor) -> None:
        """Sequence b continues what was sequence ``indices[b]``, as in beam search.

        Args:
            indices: (B,) integers.

        Raises:
            TypeError: indices is not an integer tensor. ValueError: it has another shape or device, or an index is
                negative or not below B, which on a GPU is a device-side error.
        """
        check.require_tensor("indices", indices)
        if indices.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"indices: expected an integer tensor, int32 or int64, got {indices.dtype}")
        check.require_shape("indices", indices, tuple(self.padding.shape), "(B,)")
        self._require_device("indices", indices)
        for buffer in (self.keys, self.values, self.padding):
            try:
                chosen = buffer.index_select(0, indices)
            except IndexError as error:
                got = f"{int(indices.min())} to {int(indices.max())}"
                raise ValueError(f"indices: expected 0 to B - 1 = {buffer.size(0) - 1}, got {got}") from error
            buffer.copy_(chosen)

    def _place(self, index: Tensor) -> Tensor:
        """Positions in their sequences of the tokens at ``index`` of the buffers: (N,), or (B, N) where padded."""
        if self._padded:
            return index - self.padding.unsqueeze(1)
        return index + self._dropped if self._dropped else index

    def _first_attended(self, position: Position) -> Position:
        """Position of the first token that the one at ``position`` attends to; may be negative."""
        if self.segment is not None:
            return (position // self.segment - 1) * self.segment
        return 0 * position if self.window is None else position - self.window

    def _first_slot(self) -> int:
        """Where in the buffers the first token is that any of the next ones may attend to."""
        if self.window is not None:
            return max(0, self._written - self.window)
        if self.segment is None:
            return 0
        if self._padded:  # segments begin elsewhere in each sequence
            return max(0, self._written + 1 - 2 * self.segment)
        return max(0, self._first_attended(self._written + self._dropped) - self._dropped)

    def _mask(self, index: Tensor, query_index: Tensor) -> Tensor:
        """(1, 1, N, n), or (B, 1, N, n) where padded, for keys and queries at these places of the buffers."""
        mask = index <= query_index.unsqueeze(1)
        key, query = self._place(index).unsqueeze(-2), self._place(query_index).unsqueeze(-1)
        if self._reach is not None:
            mask = mask & (key >= self._first_attended(query))
        if self._padded:
            return (mask & (key >= 0)).unsqueeze(1)
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
    """Whether a buffer lost its contents when it moved to other memory."""
    if old is new or new.is_meta or type(new) is not Tensor:
        return False
    return old.is_meta or old.tolist() != new.tolist()


def _require_not_negative(padding: Tensor) -> None:
    valid = (padding >= 0).all()
    if torch.compiler.is_compiling() or padding.device.type != "cpu":
        torch._assert_async(valid, "padding: expected counts >= 0")
    elif not valid:
        raise ValueError(f"padding: expected counts >= 0, got {int(padding.min())}")
