"""Attention in float32 and in 16 bits: forward, forward and backward, second order, forward mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.shapes import ATTENTION_SHAPES, EQUAL_HEADS, UNEQUAL_HEADS, AttentionShape
from benchmarks.targets.row import Call, Row
from fastgen.functional import scaled_dot_product_attention as attention

SDPA = "F.scaled_dot_product_attention"
WIDE = AttentionShape("equal heads, long", 2, 4, 2048, 2048, 64, 64)


def sizes(shape: AttentionShape, dtype: torch.dtype = torch.float32) -> str:
    name = "" if dtype == torch.float32 else f", {str(dtype).removeprefix('torch.')}"
    return f"({shape.batch}, {shape.heads}, {shape.queries}, {shape.keys}, {shape.key_dim}, {shape.value_dim}){name}"


def operands(shape: AttentionShape, dtype: torch.dtype, requires_grad: bool) -> list[Tensor]:
    torch.manual_seed(0)
    lengths = ((shape.queries, shape.key_dim), (shape.keys, shape.key_dim), (shape.keys, shape.value_dim))
    return [torch.randn(shape.batch, shape.heads, *rest).to(dtype).requires_grad_(requires_grad) for rest in lengths]


def mask_of(shape: AttentionShape, dtype: torch.dtype) -> dict[str, Any]:
    if shape.mask == "causal":
        return {"is_causal": True}
    if shape.mask == "bias":
        return {"attn_mask": torch.randn(1, shape.heads, shape.queries, shape.keys).to(dtype)}
    if shape.mask == "padding":
        lengths = torch.randint(shape.keys // 2, shape.keys + 1, (shape.batch, 1, 1, 1))
        return {"attn_mask": torch.arange(shape.keys) < lengths}
    return {}


def pair(shape: AttentionShape, dtype: torch.dtype, backward: bool, dropout: float) -> tuple[Call, Call]:
    """A floating mask is learned: it has a gradient where the others have."""
    tensors, options = operands(shape, dtype, backward), mask_of(shape, dtype)
    leaves = list(tensors)
    if shape.mask == "bias" and backward:
        leaves.append(options["attn_mask"].requires_grad_())
    upstream = torch.randn(shape.batch, shape.heads, shape.queries, shape.value_dim).to(dtype)

    def call(attend: Callable[..., Any]) -> Call:
        def forward() -> Any:
            return attend(*tensors, **options, dropout_p=dropout)

        return (lambda: torch.autograd.grad(forward(), leaves, upstream)) if backward else forward

    return call(attention), call(F.scaled_dot_product_attention)


def both(
    name: str,
    shape: AttentionShape,
    targets: tuple[float | None, float | None],
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
) -> list[Row]:
    """Rows of the forward pass, and of forward and backward; None: no row."""
    rows = []
    for backward, target in enumerate(targets):
        if target is not None:
            passes = "forward + backward" if backward else "forward"

            def make(backward: bool = bool(backward)) -> tuple[Call, Call]:
                return pair(shape, dtype, backward, dropout)

            rows.append(Row(f"attention, {name}, {passes}", sizes(shape, dtype), SDPA, target, make))
    return rows


def r1_step(attend: Callable[..., Tensor], tensors: list[Tensor]) -> Any:
    """Forward, gradient of the inputs, and gradient of the squared gradient norm."""
    grads = torch.autograd.grad(attend(*tensors).square().sum(), tensors, create_graph=True)
    return torch.autograd.grad(torch.stack([grad.square().sum() for grad in grads]).sum(), tensors)


def unfused(*tensors: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*tensors)


def formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.mT * query.size(-1) ** -0.5, dim=-1) @ value


def higher_rows() -> list[Row]:
    rows = []
    for shape in (UNEQUAL_HEADS, WIDE):

        def step(shape: AttentionShape = shape) -> tuple[Call, Call]:
            tensors = operands(shape, torch.float32, True)
            return (lambda: r1_step(attention, tensors)), (lambda: r1_step(unfused, tensors))

        def tangent(shape: AttentionShape = shape) -> tuple[Call, Call]:
            tensors = tuple(operands(shape, torch.float32, False))
            along = tuple(tensor.flip(2) for tensor in tensors)
            run = lambda attend: torch.func.jvp(attend, tensors, along)  # noqa: E731
            return (lambda: run(attention)), (lambda: run(formula))

        rows.append(Row("attention, R1 step", sizes(shape), "SDPBackend.MATH", 3.0, step))
        rows.append(Row("attention, output and tangent", sizes(shape), "torch.func.jvp of the formula", 4.0, tangent))
    return rows


def float32_rows() -> list[Row]:
    named = ATTENTION_SHAPES
    swin, windows = named["swin-window"].cut(batch=256, length=49), named["transgan-window"].cut(batch=32, length=256)
    sentences = named["seq2seq"]
    biased = AttentionShape("seq2seq", 64, 8, 64, 80, 64, 64, "bias")
    return [
        *both("unequal heads", UNEQUAL_HEADS, (6.0, 3.0)),
        *both("equal heads", EQUAL_HEADS, (1.0, 1.0)),
        *both("sagan-256", named["sagan-256"].cut(batch=16, length=1024), (1.0, 1.5)),
        *both("swin-window, learned bias", swin, (1.0, 1.0)),
        *both("transgan-window", windows, (1.0, 1.0)),
        *both("seq2seq, key padding", sentences, (1.0, 1.0)),
        *both("seq2seq, key padding, dropout", sentences, (None, 1.0), dropout=0.1),
        *both("seq2seq, learned bias", biased, (1.0, 1.0)),
        *both("dropout", EQUAL_HEADS, (1.0, 1.0), dropout=0.1),
    ]


def half_rows() -> list[Row]:
    windows = ATTENTION_SHAPES["transgan-window"].cut(batch=8, length=256)
    text = ATTENTION_SHAPES["char-lm"].cut(batch=8, length=256)
    sentences = ATTENTION_SHAPES["seq2seq"].cut(batch=16, length=80)
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        rows += both("equal heads", EQUAL_HEADS.cut(batch=2, length=1024), (1.0, 1.0), dtype)
        rows += both("unequal heads", UNEQUAL_HEADS.cut(batch=2, length=1024), (1.0, 1.0), dtype)
        rows += both("transgan-window", windows, (1.0, 1.0), dtype)
        rows += both("char-lm, causal", text, (1.0, 1.0), dtype)
        rows += both("seq2seq, key padding", sentences, (1.0, 1.0), dtype)
    return rows
