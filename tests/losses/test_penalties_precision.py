"""Gradient penalties in mixed precision: autocast, gradient scalers, synchronization."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.losses import (
    dragan_penalty,
    gradient_penalty,
    path_length_penalty,
    r1_penalty,
)
from tests.losses.penalty_cases import PENALTIES, network_of, penalty_of, seeded


@pytest.mark.parametrize("kind", PENALTIES)
def test_autocast_penalty_is_float32_and_close_to_full_precision(kind, device):
    network, samples = network_of(kind, dtype=torch.float32).to(device), torch.randn(5, 7, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = penalty_of(kind, network, samples)
    assert result.dtype == torch.float32
    result.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in network.parameters())
    plain = penalty_of(kind, network, samples)
    torch.testing.assert_close(result.detach(), plain.detach(), rtol=0.1, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradient_norm_is_computed_in_float32(dtype, device):
    weight = torch.full((1000,), 0.1, dtype=dtype, device=device)
    samples = torch.randn(4, 1000, device=device).to(dtype)
    norm = float(weight[0]) * math.sqrt(1000)
    with torch.autocast(device.type, dtype=dtype):
        discriminator = lambda x: (x * weight).sum(1)  # noqa: E731
        leaf = samples.clone().requires_grad_()
        for result, expected in (
            (gradient_penalty(discriminator, samples, samples.flip(0)), (norm - 1) ** 2),
            (dragan_penalty(discriminator, samples), (norm - 1) ** 2),
            (r1_penalty(discriminator(leaf), leaf), norm**2 / 2),
        ):
            assert result.dtype == torch.float32
            assert float(result) == pytest.approx(expected, rel=1e-6)
        images = leaf[..., None] * weight[0]
        penalty, mean = path_length_penalty(images, leaf, 0.0, decay=1.0, generator=seeded(device=device))
    noise = torch.randn(images.shape, device=device, generator=seeded(device=device)).squeeze(-1)
    expected = float((noise.to(dtype) * weight[0]).double().norm(dim=1).mean())
    assert penalty.dtype == mean.dtype == torch.float32
    assert float(mean) == pytest.approx(expected, rel=1e-6)


def test_autocast_does_not_cast_gradients_of_float32_operations(device):
    weight = torch.randn(1, 64, device=device)
    norm = float(weight.double().norm())

    def discriminator(x):
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x, weight)

    samples = torch.randn(4, 64, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = gradient_penalty(discriminator, samples, samples)
    assert float(result) == pytest.approx((norm - 1) ** 2, rel=1e-5)


class Underflow(nn.Module):
    """x -> 1e4 w s s (x as half), whose gradient within the half-precision part, s s, underflows in float16."""

    def __init__(self, image):
        super().__init__()
        self.image = image
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 7))

    def forward(self, x, half=torch.float16):
        tiny = torch.tensor(2.0**-13, dtype=half, device=x.device)
        small = (1e4 * x * self.weight).to(half) * tiny * tiny
        return small[..., None] if self.image else small.float().sum(1)


@pytest.mark.parametrize("kind", PENALTIES)
def test_scaler_prevents_gradient_underflow(kind, device):
    network, samples = Underflow(kind == "path length").to(device), torch.randn(5, 7, device=device)
    options = {"gradient": {"center": 0.0}, "dragan": {"center": 0.0}, "path length": {"mean": 0.0}}.get(kind, {})
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16)
    exact = penalty_of(kind, lambda x: network(x, torch.float64).float(), samples, **options)
    exact_gradient = torch.autograd.grad(exact, network.weight)[0]
    assert float(exact.detach()) > 1e-9
    underflowed = penalty_of(kind, network, samples, **options)
    assert abs(float(underflowed.detach() / exact.detach()) - 1) > 0.3
    scaled = penalty_of(kind, network, samples, scaler=scaler, **options)
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled, exact.float(), rtol=5e-3, atol=0)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    scaler.scale(scaled).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(network.weight.grad, exact_gradient.float(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("kind", PENALTIES)
def test_scaler_does_not_change_the_value(kind, device):
    for dtype in (torch.float32, torch.float64):
        network = network_of(kind, dtype=dtype).to(device)
        samples = torch.randn(5, 7, device=device, dtype=dtype)
        plain = penalty_of(kind, network, samples)
        for options in ({"init_scale": 1000.0}, {"enabled": False}):
            scaler = torch.amp.GradScaler(device.type, **options)
            torch.testing.assert_close(penalty_of(kind, network, samples, scaler=scaler), plain)


def test_initial_scale_does_not_overflow_float16_scores(device):
    leaf = torch.randn(6, 7, device=device).half().requires_grad_()
    scores = (leaf * 0.5).sum(1)
    assert scores.dtype == torch.float16
    penalty = r1_penalty(scores, leaf, scaler=torch.amp.GradScaler(device.type))
    torch.testing.assert_close(penalty, torch.tensor(7 / 8, device=device))


def test_disabled_scaler_does_not_scale_gradients(device):
    leaf = torch.randn(6, 7, device=device).half().requires_grad_()
    scores = (leaf * 2.0**-23).sum(1)  # an eighth of it is 0 in float16
    assert float(r1_penalty(scores, leaf, scaler=torch.amp.GradScaler(device.type, enabled=False)).detach()) > 0


class SyncCounter(TorchDispatchMode):
    """Counts operations that synchronize with the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", PENALTIES)
def test_penalties_do_not_synchronize(kind, device):
    network, samples = network_of(kind, dtype=torch.float32).to(device), torch.randn(5, 7, device=device)
    scaler = torch.amp.GradScaler(device.type)
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            penalty_of(kind, network, samples, scaler=scaler)
            mode = torch.cuda.get_sync_debug_mode()
            stack.callback(lambda: torch.cuda.set_sync_debug_mode(mode))
            torch.cuda.set_sync_debug_mode("error")
        syncs = stack.enter_context(SyncCounter())
        scaler.scale(penalty_of(kind, network, samples, scaler=scaler)).backward()
    assert syncs.count == 0
    with SyncCounter() as syncs:
        scaler.get_scale()
        torch.ones(()).item()
    assert syncs.count > 0
