"""The arguments of a call of attention, as one struct that passes from ``functional`` to an implementation."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Options(NamedTuple):
    """The numbers at the end of every operator's schema.

    Query i attends to keys i - window_left <= j <= i + window_right, -1 is unbounded; beside packed sequences a bound
    may be negative: -b is written as -b - 1. ``softcap`` bounds the scores, 0 does not. ``allow_tf32`` lets CUDA
    kernels multiply float32 in tf32.
    """

    dropout_p: float
    window_left: int
    window_right: int
    scale: float
    softcap: float = 0.0
    allow_tf32: bool = False


class Problem(NamedTuple):
    """A call of attention: query (B, H, N, Dk), key (B, Hk, M, Dk), value (B, Hk, M, Dv), mask (1|B, 1|H, 1|N, 1|M),
    seed (S,) int64, and the namespace of the operators that serve it.

    ``sequences`` (2, S + 1) int32: the N queries and M keys, of a batch of 1, are those of S sequences one after the
    other, which begin at these positions; a query attends to keys of its own sequence. There is no mask then.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    seed: Tensor | None
    sequences: Tensor | None
    options: Options
    namespace: str

    def flat(self) -> tuple[Any, ...]:
        """For ``torch.autograd.Function``: a nested tuple would be a pytree to torch.func, which expects leaves."""
        return (*self[:6], *self.options, self.namespace)

    @classmethod
    def of(cls, flat: tuple[Any, ...]) -> Problem:
        return cls._make((*flat[:6], Options._make(flat[6:12]), flat[12]))


class Saved(NamedTuple):
    """A call with its results, out (B, H, N, Dv) and lse (B, H, N): what its derivatives are computed from."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    mask: Tensor | None
    seed: Tensor | None
    sequences: Tensor | None
    options: Options
    namespace: str

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:8]

    def flat(self) -> tuple[Any, ...]:
        """For ``torch.autograd.Function``, as ``Problem.flat``."""
        return (*self[:8], *self.options, self.namespace)

    @classmethod
    def of(cls, flat: tuple[Any, ...]) -> Saved:
        return cls._make((*flat[:8], Options._make(flat[8:14]), flat[14]))


class Tangents(NamedTuple):
    """Directions of query, key, value and mask; None is zero."""

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    mask: Tensor | None = None


WIDEST_HEAD = 512
"""The largest head dim of the CUDA kernels (csrc/attention/tiles.h)."""


def refused_heads(query: Tensor, value: Tensor) -> str | None:
    """Why no CUDA kernel takes these head dims; None where one does."""
    dims = query.size(-1), value.size(-1)
    if min(dims) > 0 and max(dims) <= WIDEST_HEAD:
        return None
    return f"attention has CUDA kernels for head dims up to {WIDEST_HEAD}, not for {dims[0]} and {dims[1]}"
