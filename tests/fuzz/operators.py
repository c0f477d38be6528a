"""Arguments that fit, for every raw operator, and what comes out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.fuzz.draw import LENGTHS, SIZES, Draw

Shapes = list[tuple[int, ...]]


class Call(NamedTuple):
    """Arguments of an operator, and the shapes of its results."""

    arguments: list[Any]
    shapes: Shapes


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def scale(draw: Draw) -> float:
    return draw.one((0.3, 0.3, 0.3, 1.0, 0.0, -0.5))


def mask(draw: Draw, *full: int, dtype: torch.dtype | None = None) -> Tensor:
    shape = [n if draw.chance(0.6) else 1 for n in full]
    drawn = draw.tensor(*shape, dtype=dtype or draw.one((torch.bool, draw.dtype())))
    if drawn.is_floating_point() and draw.chance(0.3):
        drawn = drawn.masked_fill(torch.rand(drawn.shape) < 0.3, -math.inf)
    return drawn


class Attention:
    """A problem that the four operators share."""

    def __init__(self, draw: Draw) -> None:
        self.draw, self.dtype = draw, draw.dtype()
        batch, key_heads, groups = draw.one((0, 1, 1, 2, 4)), draw.one((0, 1, 1, 2, 3)), draw.one((1, 1, 2, 3))
        length, keys = draw.one(LENGTHS), draw.one(LENGTHS)
        dim, value_dim = draw.one((0, 1, 3, 4, 8, 16, 24, 65)), draw.one((0, 1, 5, 16, 32, 48, 128))
        self.rows, self.keys = (batch, key_heads * groups, length), (batch, key_heads, keys)
        self.query = self.like_query(dim)
        self.key = draw.tensor(*self.keys, dim, dtype=self.dtype, rows=True)
        self.value = draw.tensor(*self.keys, value_dim, dtype=self.dtype, rows=True)
        self.mask = mask(draw, *self.rows, keys) if draw.chance(0.4) else None
        dropout = draw.one((0.3, 0.9)) if draw.chance(0.3) else 0.0
        self.seed = draw.seeds(batch) if dropout > 0 else None
        bounds = (-1, -1, -1, 0, 1, 3, 2**31, 2**62, 2**63 - 1)
        softcap = draw.one((0.0, 0.0, 0.7, 30.0, 1e-30, 1e30))
        self.options = [dropout, draw.one(bounds), draw.one(bounds), scale(draw), softcap, draw.chance(0.5)]

    def like_query(self, dim: int) -> Tensor:
        return self.draw.tensor(*self.rows, dim, dtype=self.dtype, rows=True)

    def results(self) -> tuple[Tensor, Tensor]:
        arguments = (self.query, self.key, self.value, self.mask, self.seed, None, *self.options)
        out, lse = torch.ops.fastgen_torch.attention_forward(*arguments)
        return out, lse

    @property
    def shapes(self) -> Shapes:
        return [(*self.rows, self.value.size(3)), self.rows]

    @property
    def of_gradients(self) -> Shapes:
        return [tuple(t.shape) for t in (self.query, self.key, self.value)]

    def mask_grad(self) -> bool:
        return self.mask is not None and self.mask.is_floating_point() and self.draw.chance(0.6)

    def upstream(self) -> list[Tensor | None]:
        grad_lse = self.draw.maybe(self.draw.tensor(*self.rows, dtype=_wide(self.dtype)))
        return [self.like_query(self.value.size(3)), grad_lse]

    def tangents(self) -> list[Tensor | None]:
        key = self.draw.tensor(*self.key.shape, dtype=self.dtype, rows=True)
        value = self.draw.tensor(*self.value.shape, dtype=self.dtype, rows=True)
        of_mask = self.draw.tensor(*self.mask.shape, dtype=self.draw.dtype()) if self.mask is not None else None
        return [self.draw.maybe(t) for t in (self.like_query(self.query.size(3)), key, value, of_mask)]


def attention_forward(draw: Draw) -> Call:
    p = Attention(draw)
    return Call([p.query, p.key, p.value, p.mask, p.seed, None, *p.options], p.shapes)


def attention_backward(draw: Draw) -> Call:
    p = Attention(draw)
    wanted = p.mask_grad()
    arguments = [*p.upstream(), p.query, p.key, p.value, *p.results(), p.mask, p.seed, None, *p.options, wanted]
    return Call(arguments, [*p.of_gradients, tuple(p.mask.shape) if wanted and p.mask is not None else (0,)])


def attention_tangent(draw: Draw) -> Call:
    p = Attention(draw)
    arguments = [p.query, p.key, p.value, *p.results(), p.mask, p.seed, None, *p.tangents(), *p.options]
    return Call(arguments, p.shapes)


def attention_forward_tangent(draw: Draw) -> Call:
    p = Attention(draw)
    arguments = [p.query, p.key, p.value, p.mask, p.seed, None, *p.tangents(), *p.options]
    return Call(arguments, [*p.shapes, *p.shapes])


def attention_second_order(draw: Draw) -> Call:
    p = Attention(draw)
    wanted = p.mask_grad()
    of_mask = tuple(p.mask.shape) if wanted and p.mask is not None else (0,)
    middle = [p.query, p.key, p.value, *p.results(), p.mask, p.seed, None, *p.tangents()]
    return Call([*p.upstream(), *middle, *p.options, wanted], [*p.shapes, *p.of_gradients, of_mask])


class _Kernel(Attention):
    """What fastgen's own kernels of the CPU take."""

    def __init__(self, draw: Draw) -> None:
        super().__init__(draw)
        self.dtype = torch.float32
        batch, heads, keys = self.rows[0], max(self.keys[1], 1), max(self.keys[2], 1)
        self.rows, self.keys = (batch, heads * draw.one((1, 2)), self.rows[2]), (batch, heads, keys)
        dim, value_dim = draw.one((0, 1, 8, 16, 33, 64)), draw.one((0, 16, 32, 80, 256))
        self.query = self.like_query(dim)
        self.key = draw.tensor(*self.keys, dim, dtype=self.dtype, rows=True)
        self.value = draw.tensor(*self.keys, value_dim, dtype=self.dtype, rows=True)
        kind = draw.one((torch.bool, torch.float32))
        self.mask = mask(draw, *self.rows, self.keys[2], dtype=kind).contiguous() if draw.chance(0.5) else None
        self.options = self.options[:4]

    def results(self) -> tuple[Tensor, Tensor]:
        arguments = (self.query, self.key, self.value, self.mask, self.seed, *self.options)
        out, lse = torch.ops.fastgen_torch.cpu_attention_forward(*arguments)
        return out, lse

    def mask_grad(self) -> bool:
        full = self.mask is not None and self.mask.shape[2:] == (self.rows[2], self.keys[2])
        return full and super().mask_grad()

    def kernel_tangents(self) -> list[Tensor | None]:
        *others, of_mask = self.tangents()
        return [*others, None if of_mask is None else of_mask.float().contiguous()]


def cpu_attention_forward(draw: Draw) -> Call:
    p = _Kernel(draw)
    return Call([p.query, p.key, p.value, p.mask, p.seed, *p.options], p.shapes)


def cpu_attention_backward(draw: Draw) -> Call:
    p = _Kernel(draw)
    wanted = p.mask_grad()
    arguments = [*p.upstream(), p.query, p.key, p.value, *p.results(), p.mask, p.seed, *p.options, wanted]
    return Call(arguments, [*p.of_gradients, tuple(p.mask.shape) if wanted and p.mask is not None else (0,)])


def cpu_attention_tangent(draw: Draw) -> Call:
    p = _Kernel(draw)
    arguments = [p.query, p.key, p.value, *p.results(), p.mask, p.seed, *p.kernel_tangents(), *p.options]
    return Call(arguments, p.shapes)


def cpu_attention_second_order(draw: Draw) -> Call:
    p = _Kernel(draw)
    middle = [p.query, p.key, p.value, *p.results(), p.mask, p.seed, *p.kernel_tangents()]
    return Call([*p.upstream(), *middle, *p.options], [*p.shapes, *p.of_gradients])


def _tile(draw: Draw) -> tuple[Callable[[], Tensor], Callable[[], Tensor], tuple[int, ...]]:
    shape = (*(draw.one(SIZES) for _ in range(draw.random.randint(0, 3))), draw.one(LENGTHS))
    matrix = lambda: torch.randn(shape)  # noqa: E731
    return matrix, lambda: torch.randn(*shape[:-1], 1), shape


def cpu_attention_weights(draw: Draw) -> Call:
    matrix, row, shape = _tile(draw)
    grads = draw.chance(0.6)
    cross = matrix() if grads and draw.chance(0.5) else None
    of_grads = (matrix(), row()) if grads else (None, None)
    return Call([matrix(), matrix(), row(), draw.maybe(matrix()), *of_grads, cross], [(*shape[:-1], 1)])


def cpu_attention_softmax(draw: Draw) -> Call:
    matrix, row, _ = _tile(draw)
    return Call([matrix(), draw.maybe(matrix()), row().squeeze(-1)], [])


def cpu_attention_softmax_backward(draw: Draw) -> Call:
    matrix, row, _ = _tile(draw)
    return Call([matrix(), matrix(), draw.maybe(matrix()), row(), row()], [])


def cpu_dropout_keep(draw: Draw) -> Call:
    batch, heads, length, keys = draw.one((1, 2, 4)), draw.one((1, 2, 3)), draw.one(LENGTHS[1:]), draw.one(LENGTHS)
    seed = draw.seeds(batch)
    spans = []
    for size in (batch, length, keys):
        first = draw.random.randint(0, size)
        spans.append((first, draw.random.randint(0, size - first)))
    (first_batch, batches), (first_query, queries), (first_key, count) = spans
    rows_per_seed = max(1, batch // seed.numel() * heads * length)
    sizes = [rows_per_seed, first_batch, batches, heads, length, first_query, queries, keys, first_key]
    return Call([seed, *sizes, first_key + count, draw.one((0.0, 0.3, 0.99))], [(batches, heads, queries, count)])


def _tables(draw: Draw, batch: int, length: int, dim: int, dtype: torch.dtype) -> list[Tensor | None]:
    if draw.chance(0.4):
        return [None, None]
    shape = (draw.one((1, batch)), length, draw.random.randint(0, dim // 2))
    return [draw.tensor(*shape, dtype=_wide(dtype)) for _ in range(2)]


class Projection:
    """x, weight, bias, norms, tables and numbers."""

    def __init__(self, draw: Draw) -> None:
        self.draw, self.dtype, self.first = draw, draw.dtype(), draw.chance(0.4)
        batch, length, channels = draw.one((0, 1, 2, 3)), draw.one(LENGTHS[:-2]), draw.one(SIZES)
        count = draw.one((1, 2, 3, 3, 5))
        aligned = draw.chance(0.4)  # as the kernels of GPUs want it
        channels = draw.one((8, 16, 24)) if aligned else channels
        self.heads = [draw.one((1, 2, 3)) for _ in range(count)]
        self.dims = [draw.one((8, 16, 40) if aligned else (1, 2, 4, 8, 12, 40)) for _ in range(count)]
        self.batch, self.length = batch, length
        self.x = draw.tensor(
            *((batch, channels, length) if self.first else (batch, length, channels)), dtype=self.dtype
        )
        self.rows = sum(h * d for h, d in zip(self.heads, self.dims, strict=True))
        self.weight = draw.tensor(self.rows, channels, dtype=self.dtype)
        self.norms = [draw.tensor(dim, dtype=self.dtype) for dim in self.dims[: draw.one((0, 0, 1, 2))]]
        self.rotated = draw.random.randint(0, count)
        self.tables = _tables(draw, batch, length, min(self.dims[: self.rotated], default=4), self.dtype)

    def parts(self) -> Shapes:
        return [(self.batch, h, self.length, d) for h, d in zip(self.heads, self.dims, strict=True)]


def projection_forward(draw: Draw) -> Call:
    p = Projection(draw)
    bias, keep = draw.maybe(draw.tensor(p.rows, dtype=p.dtype)), draw.chance(0.5)
    numbers = [p.heads, p.dims, p.first, 1e-6, p.rotated, draw.chance(0.5), keep, draw.chance(0.5)]
    kept = p.parts()[: len(p.norms)] if keep else []
    return Call([p.x, p.weight, bias, p.norms, *p.tables, *numbers], [*p.parts(), *kept])


def projection_backward(draw: Draw) -> Call:
    p = Projection(draw)
    grads = [draw.tensor(*shape, dtype=p.dtype) for shape in p.parts()]
    kept = [draw.tensor(*shape, dtype=p.dtype) for shape in p.parts()[: len(p.norms)]]
    bias = draw.chance(0.5)
    numbers = [bias, p.first, 1e-6, p.rotated, draw.chance(0.5), draw.chance(0.5)]
    shapes = [
        tuple(p.x.shape),
        tuple(p.weight.shape),
        (p.rows if bias else 0,),
        *((d,) for d in p.dims[: len(p.norms)]),
    ]
    return Call([grads, kept, p.x, p.weight, p.norms, *p.tables, *numbers], shapes)


def _merge(draw: Draw, backward: bool) -> Call:
    dtype, first = draw.dtype(), draw.chance(0.4)
    batch, heads, length, dim = draw.one((0, 1, 2, 3)), draw.one((0, 1, 2, 3)), draw.one(LENGTHS[:-2]), draw.one(SIZES)
    channels = draw.one(SIZES)
    if draw.chance(0.4):  # as the kernels of GPUs want it
        dim, channels = draw.one((8, 16)), draw.one((8, 24))
    x, weight = draw.tensor(batch, heads, length, dim, dtype=dtype), draw.tensor(channels, heads * dim, dtype=dtype)
    bias = draw.maybe(draw.tensor(channels, dtype=dtype))
    gate_shape = (1 if backward else draw.one((1, batch)), 1, draw.one((1, channels)))
    gate = draw.maybe(draw.tensor(*gate_shape, dtype=dtype))
    flat = (batch, channels, length) if first else (batch, length, channels)
    whole, numbers = draw.tensor(*flat, dtype=dtype), [first, draw.chance(0.5)]
    if not backward:
        return Call([x, weight, bias, draw.maybe(whole), gate, *numbers], [flat])
    of_parameters: Shapes = [tuple(weight.shape), (0 if bias is None else channels,)]
    shapes = [tuple(x.shape), *of_parameters, (0,) if gate is None else tuple(gate.shape)]
    return Call([whole, x, weight, bias, gate, *numbers], shapes)


def merge_heads_forward(draw: Draw) -> Call:
    return _merge(draw, backward=False)


def merge_heads_backward(draw: Draw) -> Call:
    return _merge(draw, backward=True)


def _finish(draw: Draw) -> tuple[Tensor, list[Any]]:
    dtype = draw.one((torch.float32, torch.float16, torch.bfloat16))
    batch, heads, length, dim = (
        draw.one((0, 1, 2)),
        draw.one((0, 1, 3)),
        draw.one(LENGTHS),
        draw.one((1, 2, 7, 8, 64, 1024)),
    )
    part = draw.tensor(batch, heads, length, dim, dtype=dtype)
    norm = draw.maybe(draw.tensor(dim, dtype=draw.one((dtype, torch.float32))))
    return part, [norm, *_tables(draw, batch, length, dim, dtype), draw.one((1e-6, 0.1)), draw.chance(0.5)]


def cpu_finish_heads(draw: Draw) -> Call:
    part, rest = _finish(draw)
    return Call([part, *rest], [tuple(part.shape)])


def cpu_finish_heads_backward(draw: Draw) -> Call:
    part, rest = _finish(draw)
    grad = draw.tensor(*part.shape, dtype=part.dtype)
    of_norm = (0,) if rest[0] is None else (part.size(3),)
    return Call([grad, part, *rest], [tuple(part.shape), of_norm])


def _latent(draw: Draw) -> tuple[Callable[[], Tensor], Tensor, int, torch.dtype]:
    dtype, rows, columns = draw.dtype(), draw.one(SIZES), draw.one((*LENGTHS, 300, 1030))
    return lambda: draw.tensor(rows, columns, dtype=dtype, rows=True), draw.seeds(rows), rows, dtype


def latent_forward(draw: Draw) -> Call:
    matrix, seed, rows, _ = _latent(draw)
    mu, with_kl = matrix(), draw.chance(0.6)
    arguments = [mu, matrix(), draw.maybe(matrix()), draw.maybe(matrix()), seed, with_kl]
    return Call(arguments, [tuple(mu.shape), (rows if with_kl else 0,)])


def latent_backward(draw: Draw) -> Call:
    matrix, seed, rows, dtype = _latent(draw)
    mu, priors = matrix(), [draw.maybe(matrix()) for _ in range(2)]
    upstream = [draw.maybe(matrix()), draw.maybe(draw.tensor(rows, dtype=_wide(dtype)))]
    shapes = [tuple(mu.shape)] * 2 + [(0,) if prior is None else tuple(mu.shape) for prior in priors]
    return Call([*upstream, mu, matrix(), *priors, seed], shapes)


VALID: dict[str, Callable[[Draw], Call]] = {
    function.__name__: function
    for function in (
        attention_forward,
        attention_backward,
        attention_tangent,
        attention_forward_tangent,
        attention_second_order,
        cpu_attention_forward,
        cpu_attention_backward,
        cpu_attention_tangent,
        cpu_attention_second_order,
        cpu_attention_weights,
        cpu_attention_softmax,
        cpu_attention_softmax_backward,
        cpu_dropout_keep,
        projection_forward,
        projection_backward,
        merge_heads_forward,
        merge_heads_backward,
        cpu_finish_heads,
        cpu_finish_heads_backward,
        latent_forward,
        latent_backward,
    )
}
