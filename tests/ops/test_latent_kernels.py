"""The CUDA kernels of the Gaussian latent, run on the host, against the PyTorch implementation."""

from __future__ import annotations

import pytest
import torch

from fastgen.testing import largest_error
from tests.emulator import build

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

# Rows of part of a chunk, of part of a warp, of a warp, of a block, and long enough to be split among blocks.
SHAPES = [(1, 1), (3, 5), (5, 4), (2, 8), (7, 33), (3, 130), (4, 516), (2, 1030), (3, 2048), (1, 9000), (2, 5000)]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture
def emulated(emulator):
    build.register()
    return torch.ops.fastgen_emulated


def operands(shape, dtype, prior, aligned):
    rows, cols = shape
    mu, logvar = torch.randn(rows, 2 * cols).to(dtype).chunk(2, dim=1)
    if aligned:
        mu, logvar = mu.contiguous(), logvar.contiguous()
    priors = (
        (torch.randn(cols).to(dtype).expand(rows, cols), torch.randn(rows, cols).to(dtype)) if prior else (None,) * 2
    )
    return mu, logvar, *priors


@pytest.mark.parametrize("aligned", [True, False], ids=["rows apart", "halves"])
@pytest.mark.parametrize("prior", [False, True], ids=["unit", "prior"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_agree_with_pytorch(emulated, shape, dtype, prior, aligned):
    tensors = operands(shape, dtype, prior, aligned)
    seed = torch.arange(shape[0]) if shape[0] % 3 == 0 else torch.tensor([7])
    grad_z, grad_kl = torch.randn(shape).to(dtype), torch.randn(shape[0])
    calls = [("latent_forward", (*tensors, seed, True)), ("latent_forward", (*tensors, seed, False))]
    for upstream in ((grad_z, grad_kl), (None, grad_kl), (grad_z, None)):
        calls.append(("latent_backward", (*upstream, *tensors, seed)))
    for name, arguments in calls:
        ours = getattr(emulated, name)(*arguments)
        wanted = getattr(torch.ops.fastgen_torch, name)(*arguments)
        for a, b in zip(ours, wanted, strict=True):
            assert a.dtype == b.dtype
            scale = 1 + float(b.abs().max()) if b.numel() else 1
            assert largest_error(a, b) <= TOLERANCE[b.dtype if b.dtype in TOLERANCE else dtype] * scale


def test_every_schedule_gives_the_same_bits(emulator, emulated):
    tensors = operands((2, 5000), torch.float32, prior=True, aligned=True)
    seed, upstream = torch.tensor([7]), (torch.randn(2, 5000), torch.randn(2))
    results = []
    for schedule in range(12):
        emulator.configure(seed=schedule)
        outputs = emulated.latent_forward(*tensors, seed, True) + emulated.latent_backward(*upstream, *tensors, seed)
        results.append(torch.cat([output.flatten() for output in outputs]))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_bad_operands_are_refused_by_name(emulated):
    mu, seed = torch.zeros(4, 8), torch.tensor([1])
    for arguments, text in [
        ((mu, mu[:, :4], None, None, seed, True), r"logvar: expected shape \(4, 8\), got \(4, 4\)"),
        ((mu, mu.half(), None, None, seed, True), "logvar: expected Float, got Half"),
        ((mu, torch.zeros(8, 4).t(), None, None, seed, True), "logvar: expected a contiguous last dim"),
        (
            (mu, mu, None, None, torch.tensor([1, 2, 3]), True),
            "seed: expected a number of seeds that divides the batch, 4, got 3",
        ),
        ((mu.double(), mu.double(), None, None, seed, True), "mu: expected float32, float16 or bfloat16"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            emulated.latent_forward(*arguments)
