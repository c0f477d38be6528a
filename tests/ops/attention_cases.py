"""One attention problem of the test grid: its tensors, and the checks of its results."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import ATTENTION_SHAPES
from fastgen import random, reference
from fastgen.functional import scaled_dot_product_attention
from fastgen.testing import ROUNDING_ULPS, assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMED_DIMS = {(shape.key_dim, shape.value_dim) for shape in ATTENTION_SHAPES.values()}
EQUAL_DIMS = {(d, d) for d in (8, 16, 24, 40, 64, 72, 96, 128, 192, 256, 512)}
DIMS = sorted(NAMED_DIMS | EQUAL_DIMS | {(5, 3), (20, 136), (160, 80)})
LENGTHS = (1, 3, 17, 64, 113, 128, 129, 203, 257)
HEADS = ((2, 2), (4, 2), (3, 1))  # of the query, of key and value
LAYOUTS = ("BHND", "BNHD", "packed", "odd")
DROPOUT = (0.0, 0.3)
SOFTCAPS = (0.0, 1.5)
MASKS = (
    "none", "causal", "window", "causal window", "bool", "bool per key", "bool and causal", "bool per row",
    "float", "float and window", "float per key", "float per row", "one float", "float with holes",
)  # fmt: skip


class Case(NamedTuple):
    """A point of the grid. Its name is its seed."""

    dtype: torch.dtype
    dims: tuple[int, int]
    queries: int
    keys: int
    mask: str = "none"
    dropout: float = 0.0
    heads: tuple[int, int] = (2, 2)
    layout: str = "BHND"
    batch: int = 2
    softcap: float = 0.0

    def __str__(self) -> str:
        dtype, (key_dim, value_dim), queries, keys, mask, dropout, (heads, key_heads), layout, batch, softcap = self
        name = f"{str(dtype).removeprefix('torch.')} {key_dim}x{value_dim} {queries}x{keys} {mask.replace(' ', '_')}"
        name = f"{name} p{dropout} h{heads}:{key_heads} {layout} b{batch}"
        return f"{name} c{softcap}" if softcap else name


def matrix(layout: str, batch: int, heads: int, rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    """(B, H, N, D) of normals, laid out in memory in one of LAYOUTS; "odd" rows begin at no multiple of 16 bytes."""
    if layout == "BNHD":
        return torch.randn(batch, rows, heads, dim).to(dtype).transpose(1, 2)
    if layout == "packed":
        return torch.randn(batch, rows, 3, heads, dim).to(dtype)[:, :, 1].transpose(1, 2)
    if layout == "odd":
        return torch.randn(batch, heads, rows, dim + 3).to(dtype)[..., 1 : dim + 1]
    return torch.randn(batch, heads, rows, dim).to(dtype)


def mask_of(case: Case) -> tuple[Tensor | None, dict[str, Any]]:
    """The mask, and the arguments of the window."""
    batch, heads, queries, keys = case.batch, case.heads[0], case.queries, case.keys
    window = {"window": (keys // 3, 2)} if "window" in case.mask else {}
    causal = {"is_causal": True} if "causal" in case.mask else {}
    sizes = {
        "bool": (batch, 1, queries, keys),
        "bool per key": (batch, 1, 1, keys),
        "bool and causal": (heads, queries, keys),
        "bool per row": (queries, 1),
        "float": (heads, queries, keys),
        "float and window": (batch, 1, queries, keys),
        "float per key": (batch, 1, 1, keys),
        "float per row": (heads, queries, 1),
        "one float": (1, 1),
        "float with holes": (batch, heads, queries, keys),
    }
    if case.mask not in sizes:
        return None, window | causal
    if case.mask.startswith("bool"):
        mask = torch.rand(sizes[case.mask]) > 0.4
        if case.mask == "bool per key":
            mask[:, :, :, keys // 2 :] &= torch.rand(batch, 1, 1, 1) > 0.5  # whole tiles are ruled out
    else:
        mask = torch.randn(sizes[case.mask]).to(torch.float32 if "per" in case.mask else case.dtype)
        if case.mask == "float with holes":
            mask = mask.masked_fill(torch.rand(sizes[case.mask]) > 0.6, -math.inf)
    return mask, window | causal


def keep_of(case: Case, seed: Tensor) -> Tensor | None:
    """The dropout mask over its probability."""
    if case.dropout == 0:
        return None
    rows, groups = case.batch * case.heads[0] * case.queries, random.groups_per_row(case.keys)
    uniform = random.uniform_rows(seed, torch.arange(rows), rows, groups, 0, groups)
    keep = (uniform[:, : case.keys] >= case.dropout).double() / (1 - case.dropout)
    return keep.reshape(case.batch, case.heads[0], case.queries, case.keys)


def gradients(out: Tensor, lse: Tensor, leaves: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    finite = lse.masked_fill(lse == -math.inf, 0)
    loss = (out.double() * upstream[0]).sum() + (finite.double() * upstream[1]).sum()
    return list(torch.autograd.grad(loss, leaves))


def cancellation(
    leaves: list[Tensor],
    mask: Tensor | None,
    keep: Tensor | None,
    left: int,
    right: int,
    grad_out: Tensor,
    softcap: float = 0.0,
) -> list[float]:
    """Allowance for rounding in the gradients of query, key, value and mask, where dS = P (dP - d) cancels.

    First, float32 rounds the sums: a few units in the last place of the sum of absolute values. Second,
    d = rowsum(dO O) takes O as it was kept, rounded to the dtype, as every fused attention does, while the plain
    formula adds up what it has just multiplied: four standard deviations of that rounding.
    """
    dtype = leaves[0].dtype
    query, key, value, *learned = (leaf.double() for leaf in leaves)
    heads, group = query.size(1), query.size(1) // key.size(1)
    key, value = reference.expand_heads(key, heads), reference.expand_heads(value, heads)
    mask = learned[0] if learned else mask
    scale = query.size(-1) ** -0.5
    weights, _ = reference.softmax_lse(reference.attention_scores(query, key, mask, left, right, scale, softcap))
    derivative, _ = reference.softcap_derivatives(query, key, scale, softcap)
    dropped = weights if keep is None else weights * keep
    products = grad_out * (dropped @ value)

    def propagated(scores: Tensor, derivative: Tensor, q: Tensor, k: Tensor) -> list[Tensor]:
        grad_key = ((derivative * scores).mT @ q).unflatten(1, (-1, group)).sum(2)
        return [(derivative * scores) @ k, grad_key, *(scores.sum_to_size(m.shape) for m in learned)]

    row = products.abs().sum(-1, keepdim=True)
    sizes = weights * ((grad_out.abs() @ value.abs().mT) * (1 if keep is None else keep) + row)
    sums = propagated(sizes, derivative, scale * query.abs(), scale * key.abs())
    variance = weights.square() * products.square().sum(-1, keepdim=True)
    squares = propagated(variance, derivative.square(), (scale * query).square(), (scale * key).square())
    of_value = (dropped.mT @ grad_out.abs()).unflatten(1, (-1, group)).sum(2)
    rounding = ROUNDING_ULPS * torch.finfo(torch.float32).eps
    deviation = 4 * torch.finfo(dtype).eps / 12**0.5
    found = [
        rounding * float(size.max()) + deviation * float(square.max()) ** 0.5
        for size, square in zip(sums, squares, strict=True)
    ]
    return [*found[:2], rounding * float(of_value.max()), *found[2:]]


def cancellation_second_order(
    leaves: list[Tensor],
    directions: list[Tensor],
    mask: Tensor | None,
    keep: Tensor | None,
    left: int,
    right: int,
    grad_out: Tensor,
    softcap: float = 0.0,
) -> list[float]:
    """The same for the second order: for O', l' and the gradients of query, key, value and mask.

    O' = A - w O takes O as it was kept, and r = rowsum(dO O') takes O' as it is stored.
    """
    dtype = leaves[0].dtype
    query, key, value, *learned = (leaf.double() for leaf in leaves)
    of_query, of_key, of_value, *of_mask = (direction.double() for direction in directions)
    heads, group = query.size(1), query.size(1) // key.size(1)
    key, value, of_key, of_value = (reference.expand_heads(t, heads) for t in (key, value, of_key, of_value))
    mask, scale = learned[0] if learned else mask, query.size(-1) ** -0.5
    weights, _ = reference.softmax_lse(reference.attention_scores(query, key, mask, left, right, scale, softcap))
    kept = torch.ones_like(weights) if keep is None else keep
    derivative, second_derivative = reference.softcap_derivatives(query, key, scale, softcap)

    def direction(q: Tensor, k: Tensor, gq: Tensor, gk: Tensor, gm: list[Tensor]) -> Tensor:
        return derivative * scale * (gq @ k.mT + q @ gk.mT) + (gm[0] if gm else 0)

    centered = direction(query, key, of_query, of_key, of_mask)
    curvature = second_derivative.abs() * scale * (of_query @ key.mT + query @ of_key.mT).abs()
    mean = (weights * centered).sum(-1, keepdim=True)
    centered = centered - mean
    out = (weights * kept) @ value
    tangent = (weights * centered * kept) @ value + (weights * kept) @ of_value
    # Sums of absolute values, which float32 rounds.
    magnitude = direction(query.abs(), key.abs(), of_query.abs(), of_key.abs(), [m.abs() for m in of_mask])
    wide = magnitude + (weights * magnitude).sum(-1, keepdim=True)
    of_out = (weights * wide * kept) @ value.abs() + (weights * kept) @ of_value.abs()
    sizes = weights * ((grad_out.abs() @ value.abs().mT) * kept + (grad_out * out).abs().sum(-1, keepdim=True))
    second_row = (grad_out.abs() * of_out).sum(-1, keepdim=True)
    second_sizes = wide * sizes + weights * ((grad_out.abs() @ of_value.abs().mT) * kept + second_row)
    # Variances that the rounding of O and O' brings into d and r.
    of_delta = (grad_out * out).square().sum(-1, keepdim=True)
    of_second = (grad_out * tangent).square().sum(-1, keepdim=True) + mean.square() * of_delta
    variance = weights.square() * of_delta
    second_variance = weights.square() * (centered.square() * of_delta + of_second)

    def propagated(
        of_mask: Tensor, second: Tensor, first: Tensor, q: Tensor, k: Tensor, gq: Tensor, gk: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        grad_key = (second.mT @ q + first.mT @ gq).unflatten(1, (-1, group)).sum(2)
        return second @ k + first @ gk, grad_key, [of_mask.sum_to_size(m.shape) for m in learned]

    tensors = (query, key, of_query, of_key)
    capped_sizes = derivative * second_sizes + curvature * sizes, derivative * sizes
    sums = propagated(second_sizes, *capped_sizes, *(scale * t.abs() for t in tensors))
    capped_variance = (
        derivative.square() * second_variance + curvature.square() * variance,
        derivative.square() * variance,
    )
    squares = propagated(second_variance, *capped_variance, *((scale * t).square() for t in tensors))
    of_value_grad = ((weights * wide * kept).mT @ grad_out.abs()).unflatten(1, (-1, group)).sum(2)
    rounding = ROUNDING_ULPS * torch.finfo(torch.float32).eps
    deviation = 4 * torch.finfo(dtype).eps / 12**0.5
    largest = lambda t: float(t.max()) if t.numel() else 0.0  # noqa: E731
    grads = [
        rounding * largest(size) + deviation * largest(square) ** 0.5
        for size, square in zip((*sums[:2], *sums[2]), (*squares[:2], *squares[2]), strict=True)
    ]
    of_tangent = rounding * largest(of_out) + deviation * largest((mean * out).abs())
    of_lse = rounding * largest((weights * magnitude).sum(-1))
    return [of_tangent, of_lse, *grads[:2], rounding * largest(of_value_grad), *grads[2:]]


class Problem(NamedTuple):
    """The tensors of a case, on the host."""

    leaves: list[Tensor]  # query, key, value and a float mask
    mask: Tensor | None
    window: dict[str, Any]
    upstream: list[Tensor]  # gradients of out and lse, float64
    keep: Tensor | None
    softcap: float

    @property
    def sides(self) -> tuple[int, int]:
        left, right = self.window.get("window", (-1, -1))
        return left, 0 if "is_causal" in self.window else right

    def formula(self, leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
        """In the dtype of the leaves."""
        keep = None if self.keep is None else self.keep.to(leaves[0].dtype)
        mask = leaves[3] if len(leaves) == 4 else self.mask
        return reference.attention(*leaves[:3], mask, keep, *self.sides, softcap=self.softcap)

    def ours(self, leaves: list[Tensor], dropout: float) -> tuple[Tensor, Tensor]:
        mask = self.mask if self.mask is None else self.mask.to(leaves[0].device)
        drawn = torch.randint
        torch.randint = lambda *args, **kwargs: torch.tensor([7], device=leaves[0].device)  # the seed of dropout
        try:
            return scaled_dot_product_attention(
                *leaves[:3], leaves[3] if len(leaves) == 4 else mask, dropout, enable_gqa=True, return_lse=True,
                softcap=self.softcap or None, **self.window,
            )  # fmt: skip
        finally:
            torch.randint = drawn


def problem_of(case: Case, seed: int) -> Problem:
    torch.manual_seed(seed)
    heads, key_heads = case.heads
    query = matrix(case.layout, case.batch, heads, case.queries, case.dims[0], case.dtype)
    key = matrix(case.layout, case.batch, key_heads, case.keys, case.dims[0], case.dtype)
    value = matrix(case.layout, case.batch, key_heads, case.keys, case.dims[1], case.dtype)
    mask, window = mask_of(case)
    learned = mask is not None and mask.is_floating_point()
    leaves = [query, key, value, *([mask] if learned else [])]
    out_shape = (case.batch, heads, case.queries, case.dims[1])
    upstream = [torch.randn(out_shape).to(torch.bfloat16).double(), torch.randn(out_shape[:3]).double()]
    return Problem(leaves, mask, window, upstream, keep_of(case, torch.tensor([7])), case.softcap)


NAMES = ("out", "lse", "grad of query", "grad of key", "grad of value", "grad of mask")


def check(case: Case, device: torch.device, seed: int = 0) -> None:
    """Outputs and all gradients, of the logsumexp too, within twice the error of the plain formula."""
    problem = problem_of(case, seed)

    def results(leaves: list[Tensor], out: Tensor, lse: Tensor) -> list[Tensor]:
        return [out, lse, *gradients(out, lse, leaves, [u.to(out.device) for u in problem.upstream])]

    def formula(dtype: torch.dtype) -> list[Tensor]:
        leaves = [leaf.to(dtype).requires_grad_() for leaf in problem.leaves]
        return results(leaves, *problem.formula(leaves))

    on_device = [leaf.to(device).detach().requires_grad_() for leaf in problem.leaves]
    ours = results(on_device, *problem.ours(on_device, case.dropout))
    left, right = problem.sides
    granted = cancellation(problem.leaves, problem.mask, problem.keep, left, right, problem.upstream[0], case.softcap)
    compared = (ours, formula(case.dtype), formula(torch.float64), [0.0, 0.0, *granted])
    for name, actual, plain, exact, allowance in zip(NAMES, *compared, strict=False):
        assert_accurate(actual.cpu(), plain, exact, name, allowance)


def check_second_order(case: Case, device: torch.device, seed: int = 0, tolerance: float = 0.0) -> None:
    """The gradients of a weighted sum of all gradients, and the tangents in the direction of the weights.

    The first two of the gradients, of those of out and lse, are the tangents of out and lse: to the bit, or up to
    ``tolerance`` where another kernel computes tangents.
    """
    problem = problem_of(case, seed)
    leaves, (grad_out, grad_lse) = problem.leaves, problem.upstream
    directions = [torch.randn(leaf.shape).to(torch.bfloat16).to(leaf) for leaf in leaves]

    def second(
        leaves: list[Tensor], directions: list[Tensor], upstream: list[Tensor], out: Tensor, lse: Tensor
    ) -> list[Tensor]:
        finite = lse.masked_fill(lse == -math.inf, 0)
        grads = torch.autograd.grad([out, finite], leaves, upstream, create_graph=True)
        total = sum((g.double() * d.double()).sum() for g, d in zip(grads, directions, strict=True))
        assert isinstance(total, Tensor)
        return list(torch.autograd.grad(total, [*upstream, *leaves]))

    def formula(dtype: torch.dtype) -> list[Tensor]:
        cast = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        out, lse = problem.formula(cast)
        upstream = [grad_out.to(dtype).requires_grad_(), grad_lse.to(lse.dtype).requires_grad_()]
        return second(cast, directions, upstream, out, lse)

    on_device = [leaf.to(device).detach().requires_grad_() for leaf in leaves]
    there = [direction.to(device) for direction in directions]
    out, lse = problem.ours(on_device, case.dropout)
    upstream = [grad_out.to(out).requires_grad_(), grad_lse.to(lse).requires_grad_()]
    ours = second(on_device, there, upstream, out, lse)
    _, tangents = torch.func.jvp(
        lambda *leaves: problem.ours(list(leaves), case.dropout), tuple(t.detach() for t in on_device), tuple(there)
    )
    seen = (lse != -math.inf).to(lse.dtype)  # the fill value of a fully masked row is constant
    for name, tangent, gradient in (("out", tangents[0], ours[0]), ("lse", tangents[1] * seen, ours[1])):
        message = f"the gradient of that of {name} is the tangent of {name}"
        torch.testing.assert_close(gradient, tangent, rtol=tolerance, atol=tolerance, msg=message)

    granted = cancellation_second_order(
        leaves, directions, problem.mask, problem.keep, *problem.sides, grad_out, case.softcap
    )
    compared = (ours, formula(case.dtype), formula(torch.float64), granted)
    for name, actual, plain, exact, allowance in zip(NAMES, *compared, strict=False):
        assert_accurate(actual.cpu(), plain, exact, f"of second order, {name}", allowance)
