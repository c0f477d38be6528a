"""Gaussian latent against eager PyTorch: mu + randn * exp(logvar / 2) and a separate KL sum."""

from __future__ import annotations

import pytest
import torch

from benchmarks.shapes import LATENT_SHAPES
from fastgen.bench.cases import eager_latent
from fastgen.functional import reparameterize_kl


def inputs(shape, device, requires_grad=False):
    torch.manual_seed(0)
    encoded = torch.randn(shape[0], 2 * shape[1], *shape[2:], device=device)
    return [t.detach().requires_grad_(requires_grad) for t in encoded.chunk(2, dim=1)]


@pytest.mark.parametrize("name", LATENT_SHAPES)
def test_forward(against, device, name):
    mu, logvar = inputs(LATENT_SHAPES[name], device)
    against(
        lambda: reparameterize_kl(mu, logvar),
        {"eager": lambda: eager_latent(mu, logvar)},
        bytes_moved=3 * mu.numel() * mu.element_size(),
    )


@pytest.mark.parametrize("name", LATENT_SHAPES)
def test_forward_and_backward(against, device, name):
    mu, logvar = inputs(LATENT_SHAPES[name], device, requires_grad=True)
    grad_z, grad_kl = torch.randn(mu.shape, device=device), torch.randn(mu.size(0), device=device)

    def step(function):
        return torch.autograd.grad(function(mu, logvar), (mu, logvar), (grad_z, grad_kl))

    against(
        lambda: step(reparameterize_kl),
        {"eager": lambda: step(eager_latent)},
        bytes_moved=8 * mu.numel() * mu.element_size(),
    )


def test_memory_saved_for_backward(device, benchmark):
    """Bytes saved for backward besides inputs and outputs: a seed, against the noise and intermediate results."""

    def kept(function):
        mu, logvar = inputs(LATENT_SHAPES["wide"], device, requires_grad=True)
        held = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.setdefault(t.data_ptr(), t), lambda t: t):
            outputs = function(mu, logvar)
        excluded = {t.data_ptr() for t in (mu, logvar, *outputs)}
        return sum(t.numel() * t.element_size() for pointer, t in held.items() if pointer not in excluded)

    benchmark.extra_info["kept_bytes"] = {"ours": kept(reparameterize_kl), "eager": kept(eager_latent)}
    benchmark.pedantic(lambda: kept(reparameterize_kl), rounds=1)
    assert kept(reparameterize_kl) == 8


def test_torch_compile_on_the_wide_shape(against, device):
    mu, logvar = inputs(LATENT_SHAPES["wide"], device)
    compiled = torch.compile(eager_latent)
    against(lambda: reparameterize_kl(mu, logvar), {"torch.compile": lambda: compiled(mu, logvar)})
