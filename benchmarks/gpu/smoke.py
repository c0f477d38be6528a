"""The first calls of each family, compared with PyTorch's formulas in float64: no test runner, seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgen
from benchmarks.gpu.session import REHEARSAL, Session
from benchmarks.shapes import ATTENTION_SHAPES
from fastgen import functional as G
from fastgen import reference

BACKEND = "emulated" if REHEARSAL else "compiled"
DTYPES = (torch.bfloat16, torch.float32)
TOLERANCE = {torch.bfloat16: 4e-2, torch.float32: 2e-4}
"""Of the largest error, relative to the largest value: finds wrong kernels. The tests are strict."""


def device() -> torch.device:
    return torch.device("cpu" if REHEARSAL else "cuda")


@cache
def prepare() -> None:
    """In a rehearsal: registers the emulated kernels, which know the tensors that are allocated from now on."""
    if REHEARSAL:
        from tests.emulator import build

        build.register()
        build.track_tensors(True)


def kernels() -> AbstractContextManager[object]:
    """Forces the kernels; in a rehearsal, the emulated ones. Operands are allocated after :func:`prepare`."""
    prepare()
    return fastgen.use_backend(BACKEND)


def differences(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest relative error."""
    errors = []
    for one, exact in zip(found, wanted, strict=True):
        one, exact = one.detach().double().cpu(), exact.detach().double().cpu()
        if not bool(one.isfinite().all()):
            return float("inf")
        errors.append(float((one - exact).abs().max() / exact.abs().max().clamp_min(1e-3)))
    return max(errors)


Case = Callable[[torch.dtype], tuple[Sequence[Tensor], Sequence[Tensor]]]


def attention_case(order: str, name: str) -> Case:
    """Forward, first or second derivatives of a named shape, cut."""
    length = 40 if REHEARSAL else 160

    def run(dtype: torch.dtype) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        shape = ATTENTION_SHAPES[name].cut(batch=1, length=length)
        generator = torch.Generator().manual_seed(0)
        heads = min(shape.heads, 2)
        sizes = ((shape.queries, shape.key_dim), (shape.keys, shape.key_dim), (shape.keys, shape.value_dim))
        cpu = [torch.randn(1, heads, *size, generator=generator).to(dtype) for size in sizes]
        causal = shape.mask == "causal"
        exact_inputs = [one.double().requires_grad_() for one in cpu]
        inputs = [one.to(device()).requires_grad_() for one in cpu]

        def step(call: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
            out = call(*tensors, is_causal=causal)
            if order == "forward":
                return [out]
            if order == "backward":
                return list(torch.autograd.grad(out.square().sum(), tensors))
            grads = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
            total = torch.stack([grad.square().sum() for grad in grads]).sum()
            return list(torch.autograd.grad(total, tensors))

        with kernels():
            found = step(G.scaled_dot_product_attention, inputs)
        wanted = (
            step(torch.nn.functional.scaled_dot_product_attention, exact_inputs) if order != "second order" else None
        )
        if wanted is None:
            with sdpa_kernel(SDPBackend.MATH):
                wanted = step(torch.nn.functional.scaled_dot_product_attention, exact_inputs)
        return found, wanted

    return run


def latent_case(backward: bool) -> Case:
    def run(dtype: torch.dtype) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        generator = torch.Generator().manual_seed(0)
        cpu = [torch.randn(64, 96, generator=generator).to(dtype) for _ in range(2)]
        inputs = [one.to(device()).requires_grad_() for one in cpu]
        exact = [one.double().requires_grad_() for one in cpu]
        with kernels():
            _, kl = G.reparameterize_kl(*inputs)
            found = list(torch.autograd.grad(kl.sum(), inputs)) if backward else [kl]
        mu, logvar = exact
        wanted_kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
        wanted = list(torch.autograd.grad(wanted_kl.sum(), exact)) if backward else [wanted_kl]
        return found, wanted

    return run


def projection_case(dtype: torch.dtype) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    cpu = [torch.randn(*size, generator=generator).to(dtype) / 4 for size in ((2, 40, 64), (2 * 96, 64), (2 * 96,))]
    inputs = [one.to(device()).requires_grad_() for one in cpu]
    exact = [one.double().requires_grad_() for one in cpu]
    with kernels():
        parts = G.qkv_projection(*inputs, heads=(2, 2, 2), head_dims=(32, 32, 32))
        found = [*parts, *torch.autograd.grad(sum(part.float().square().sum() for part in parts), inputs)]
    split = reference.split_heads(torch.nn.functional.linear(*exact), [2, 2, 2], [32, 32, 32])
    wanted = [*split, *torch.autograd.grad(sum(part.square().sum() for part in split), exact)]
    return found, wanted


CASES: dict[str, dict[str, Case]] = {
    "device layer": {},
    "latent": {"forward": latent_case(False), "backward": latent_case(True)},
    "projection": {"qkv, forward and backward": projection_case},
    "layers": {},
}
for _order in ("forward", "backward", "second order"):
    _names = ("char-lm", "sagan-64") if REHEARSAL else ("char-lm", "sagan-64", "dit-xl", "long")
    CASES[_order] = {name: attention_case(_order, name) for name in _names}


def run(session: Session, family: str) -> int:
    """Writes a row for each case of a family. Returns the number of failures."""
    prepare()
    failures = 0
    for name, case in CASES[family].items():
        for dtype in DTYPES:
            start, error, problem = time.monotonic(), float("nan"), ""
            try:
                error = differences(*case(dtype))
                if not REHEARSAL:
                    torch.cuda.synchronize()
            except Exception as exception:
                problem = f"{type(exception).__name__}: {exception}"[:500]
            passed = not problem and error <= TOLERANCE[dtype]
            failures += not passed
            session.write(
                "smoke", family=family, case=name, dtype=str(dtype).removeprefix("torch."), passed=passed,
                error=error, problem=problem, seconds=round(time.monotonic() - start, 2),
            )  # fmt: skip
            if "CUDA error" in problem or "illegal" in problem:
                return failures  # the process is poisoned
    return failures
