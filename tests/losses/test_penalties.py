"""Gradient penalties and path length: values, derivatives, sampling, mixed precision, errors, compiled modules."""

from __future__ import annotations

import contextlib
import doctest
import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import fastgen
from fastgen.losses import (
    _input_gradient,
    dragan_penalty,
    gradient_penalty,
    path_length,
    path_length_penalty,
    penalties,
    r1_penalty,
    r2_penalty,
)

SHAPES = [(5, 7), (5, 3, 4, 4), (5, 6, 2)]
PENALTIES = ["gradient", "dragan", "r1", "r2", "path length"]


def seeded(seed=3, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def critic(shape, dtype=torch.float64):
    """A small smooth discriminator for samples of this shape."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape[1:]), 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)


def decoder(shape=(5, 7), dtype=torch.float64):
    """A small smooth generator of (B, 2, 3, 3) images from latents of this shape."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(shape[1:]), 6), nn.Tanh(), nn.Linear(6, 18), nn.Unflatten(1, (2, 3, 3))
    ).to(dtype)


def penalty_of(kind, network, samples, seed=3, mean=0.3, **kwargs):
    """One penalty of a discriminator, or of a generator with ``samples`` as latents."""
    generator = torch.Generator(samples.device).manual_seed(seed)
    if kind == "gradient":
        return gradient_penalty(network, samples, samples.flip(0) + 1, generator=generator, **kwargs)
    if kind == "dragan":
        return dragan_penalty(network, samples, generator=generator, **kwargs)
    leaf = samples.detach().clone().requires_grad_()
    if kind == "r1":
        return r1_penalty(network(leaf), leaf, **kwargs)
    if kind == "r2":
        fake = leaf * 2
        return r2_penalty(network(fake), fake, **kwargs)
    return path_length_penalty(network(leaf), leaf, mean, generator=generator, **kwargs)[0]


def network_of(kind, shape=(5, 7), dtype=torch.float64):
    return decoder(shape, dtype) if kind == "path length" else critic(shape, dtype)


# --------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("trailing", [(), (1,), (1, 1, 1)], ids=["B", "B1", "B111"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_penalties_of_a_linear_discriminator_match_its_weight_norm(shape, trailing, dtype):
    weight = torch.randn(shape[1:], dtype=dtype)
    real, fake = torch.randn(2, *shape, dtype=dtype)
    discriminator = lambda x: (x * weight).flatten(1).sum(1).reshape(-1, *trailing)  # noqa: E731
    norm = weight.norm()
    leaf = real.clone().requires_grad_()
    results = {
        "gradient": (gradient_penalty(discriminator, real, fake), (norm - 1) ** 2),
        "gradient, center 0": (gradient_penalty(discriminator, real, fake, center=0), norm**2),
        "gradient, center 2.5": (gradient_penalty(discriminator, real, fake, center=2.5), (norm - 2.5) ** 2),
        "dragan": (dragan_penalty(discriminator, real), (norm - 1) ** 2),
        "dragan, center 2.5": (dragan_penalty(discriminator, real, center=2.5), (norm - 2.5) ** 2),
        "r1": (r1_penalty(discriminator(leaf), leaf), norm**2 / 2),
        "r2": (r2_penalty(discriminator(leaf), leaf), norm**2 / 2),
    }
    for name, (result, expected) in results.items():
        assert result.shape == (), name
        assert result.dtype == dtype, name
        torch.testing.assert_close(result.detach(), expected, msg=name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_penalties_of_a_quadratic_discriminator_match_the_norm_of_the_input(shape):
    real, fake = torch.randn(2, *shape, dtype=torch.float64)
    inputs = []

    def discriminator(x):
        inputs.append(x.detach().clone())
        return x.square().flatten(1).sum(1) / 2

    for call in (
        lambda: gradient_penalty(discriminator, real, fake, center=0.5),
        lambda: dragan_penalty(discriminator, real, center=0.5),
    ):
        penalty = call()
        norms = inputs.pop().flatten(1).norm(dim=1)
        torch.testing.assert_close(penalty.detach(), (norms - 0.5).square().mean())
    expected = real.square().sum() / shape[0] / 2
    leaf = real.clone().requires_grad_()
    torch.testing.assert_close(r1_penalty(discriminator(leaf), leaf).detach(), expected)
    fake = leaf * 3
    torch.testing.assert_close(r2_penalty(discriminator(fake), fake).detach(), expected * 9)


@pytest.mark.parametrize("layers", [(), (4,), (2, 3)], ids=["Bw", "BLw", "BKLw"])
def test_path_length_of_a_linear_generator_matches_its_matrix(layers):
    batch, width, image = 5, 6, (3, 4, 2)
    latents = torch.randn(batch, *layers, width, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(latents[0].numel(), math.prod(image), dtype=torch.float64)
    images = (latents.flatten(1) @ matrix).reshape(batch, *image)
    penalty, mean = path_length_penalty(images, latents, torch.tensor(0.7), decay=0.2, generator=seeded())
    noise = torch.randn(images.shape, dtype=torch.float64, generator=seeded()) / math.sqrt(4 * 2)
    jacobian_noise = (noise.flatten(1) @ matrix.T).reshape(latents.shape)
    lengths = jacobian_noise.square().sum(-1).reshape(batch, -1).mean(1).sqrt()
    start = float(torch.tensor(0.7))
    torch.testing.assert_close(mean, start + 0.2 * (lengths.mean() - start))
    torch.testing.assert_close(penalty.detach(), (lengths - mean).square().mean())
    assert penalty.shape == mean.shape == ()
    assert penalty.dtype == mean.dtype == torch.float64


def test_path_length_is_independent_of_the_number_of_pixels():
    for side in (2, 16):
        latents = torch.randn(2000, 3, requires_grad=True)
        images = latents[:, :1, None, None].expand(-1, 1, side, side)  # J^T y is a sum of pixels, N(0, 1)
        mean = path_length_penalty(images, latents, 0.0, decay=1.0, generator=seeded())[1]
        assert abs(float(mean) - math.sqrt(2 / math.pi)) < 0.05


def test_path_length_running_mean_converges_and_is_detached():
    latents = torch.randn(8, 4, requires_grad=True)
    scale = torch.tensor(1.5, requires_grad=True)
    mean, start = torch.zeros(()), torch.zeros(())
    for _ in range(3):
        penalty, mean = path_length_penalty((scale * latents)[..., None], latents, mean, decay=1.0, generator=seeded())
        assert not mean.requires_grad
    again, unmoved = path_length_penalty((scale * latents)[..., None], latents, mean, generator=seeded())
    torch.testing.assert_close(unmoved, mean)
    torch.testing.assert_close(again, penalty)
    assert float(start) == 0
    # lengths = scale * r: with the mean constant the derivative is 2 E[(scale r - mean) r], not that of a variance.
    lengths = torch.randn(8, 4, 1, generator=seeded()).squeeze(-1).norm(dim=1)
    expected = (2 * (scale * lengths - mean) * lengths).mean()
    torch.testing.assert_close(torch.autograd.grad(penalty, scale)[0], expected.detach())
    number = path_length_penalty((scale * latents)[..., None], latents, 0, decay=1.0, generator=seeded())[1]
    torch.testing.assert_close(number, mean)
    learned = torch.tensor(0.3, requires_grad=True)
    assert not path_length_penalty((scale * latents)[..., None], latents, learned)[1].requires_grad


@pytest.mark.parametrize("kind", PENALTIES)
def test_nan_gradients_propagate_to_the_penalty(kind):
    network = network_of(kind, dtype=torch.float32)
    with torch.no_grad():
        network[1].weight[0, 0] = math.nan
    assert bool(penalty_of(kind, network, torch.randn(5, 7)).isnan())


@pytest.mark.parametrize("kind", PENALTIES)
def test_zero_gradient_norm_gives_finite_parameter_gradients(kind):
    network = network_of(kind, dtype=torch.float32)
    nn.init.zeros_(network[3].weight)
    penalty = penalty_of(kind, network, torch.randn(5, 7))
    penalty.backward()
    assert bool(penalty.isfinite())
    assert all(bool(weight.grad.isfinite().all()) for weight in network.parameters() if weight.grad is not None)


# --------------------------------------------------------------------------------------------------
# Derivatives


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", PENALTIES)
def test_gradcheck_with_respect_to_parameters(kind, shape):
    network = network_of(kind, shape)
    samples = torch.randn(shape, dtype=torch.float64)
    names, values = zip(*network.named_parameters(), strict=True)

    def call(*parameters):
        module = lambda x: functional_call(network, dict(zip(names, parameters, strict=True)), (x,))  # noqa: E731
        # The updated mean is detached, but finite differences would include its change.
        return penalty_of(kind, module, samples, **({"decay": 1e-12} if kind == "path length" else {}))

    parameters = [value.detach().clone().requires_grad_() for value in values]
    assert gradcheck(call, parameters, fast_mode=shape != SHAPES[0])
    if shape == SHAPES[0]:
        assert gradgradcheck(call, parameters, fast_mode=True, atol=1e-4)


def test_r1_matches_per_sample_gradients_of_torch_func():
    network, real = critic((5, 7)), torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    parameters = dict(network.named_parameters())

    def expected(parameters):
        score = lambda x: functional_call(network, parameters, (x[None],)).sum()  # noqa: E731
        return vmap(grad(score))(real.detach()).square().sum(1).mean() / 2

    penalty = r1_penalty(network(real), real)
    torch.testing.assert_close(penalty, expected(parameters))
    results = torch.autograd.grad(penalty, parameters.values(), allow_unused=True)
    for result, wanted in zip(results, grad(expected)(parameters).values(), strict=True):
        torch.testing.assert_close(torch.zeros_like(wanted) if result is None else result, wanted)


def test_r1_scores_can_be_reused_by_the_loss():
    network, real = critic((5, 7)), torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    parameters = tuple(network.parameters())
    scores = network(real)
    results = torch.autograd.grad(r1_penalty(scores, real) + scores.square().mean(), parameters)
    alone = torch.autograd.grad(r1_penalty(network(real), real), parameters, materialize_grads=True)
    loss = torch.autograd.grad(network(real).square().mean(), parameters)
    for result, first, second in zip(results, alone, loss, strict=True):
        torch.testing.assert_close(result, first + second)


def test_r2_backpropagates_to_the_generator_unless_detached():
    network, generator = critic((5, 7)), nn.Linear(3, 7).double()
    fake = generator(torch.randn(5, 3, dtype=torch.float64))
    r2_penalty(network(fake), fake).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in generator.parameters())
    generator.zero_grad()
    detached = generator(torch.randn(5, 3, dtype=torch.float64)).detach().requires_grad_()
    r2_penalty(network(detached), detached).backward()
    assert all(p.grad is None for p in generator.parameters())


@pytest.mark.parametrize("kind", PENALTIES)
def test_zero_gradient_norm_gives_finite_second_derivatives(kind):
    weight = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    network = lambda x: (x * weight).sum(1)  # noqa: E731
    if kind == "path length":
        network = lambda x: (x * weight)[..., None]  # noqa: E731
    penalty = penalty_of(kind, network, torch.randn(5, 7, dtype=torch.float64))
    (first,) = torch.autograd.grad(penalty, weight, create_graph=True)
    torch.testing.assert_close(first, torch.zeros_like(first))
    (second,) = torch.autograd.grad(first.sum(), weight)
    assert bool(second.isfinite().all())


def test_zero_gradient_of_one_sample_does_not_affect_the_others():
    weight = torch.tensor([0.6, -0.8], dtype=torch.float64, requires_grad=True)
    network = lambda x: 3 * (x * weight).sum(1).relu()  # noqa: E731
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)  # gradient norms 3 and 0
    penalty = gradient_penalty(network, points, points)
    torch.testing.assert_close(penalty.detach(), torch.tensor((4 + 1) / 2, dtype=torch.float64))
    torch.testing.assert_close(torch.autograd.grad(penalty, weight)[0], (3 * 2 * weight).detach())


# --------------------------------------------------------------------------------------------------
# Sampling


def recorded(penalty):
    """Input of the discriminator in ``penalty(discriminator)``."""
    inputs = []

    def discriminator(x):
        inputs.append(x)
        return x.flatten(1).sum(1)

    penalty(discriminator)
    assert len(inputs) == 1
    assert inputs[0].is_leaf
    assert inputs[0].requires_grad
    return inputs[0].detach()


@pytest.mark.parametrize("shape", [(6, 7), (6, 3, 4, 4), (6, 5, 2), (6,)], ids=str)
def test_gradient_penalty_interpolates_each_sample_with_one_coefficient(shape):
    real, fake = torch.randn(2, *shape, dtype=torch.float64)
    if shape == (6,):  # recorded() sums over the dims of a sample
        points = []
        gradient_penalty(lambda x: points.append(x) or x * 2, real, fake, generator=seeded())
        points = points[0].detach()
    else:
        points = recorded(lambda d: gradient_penalty(d, real, fake, generator=seeded()))
    alphas = ((points - fake) / (real - fake)).reshape(6, -1)
    torch.testing.assert_close(alphas, alphas[:, :1].expand_as(alphas), rtol=1e-6, atol=1e-6)
    assert alphas[:, 0].unique().numel() == 6
    alpha = torch.rand(6, *(1 for _ in shape[1:]), dtype=torch.float64, generator=seeded())
    torch.testing.assert_close(points, alpha * real + (1 - alpha) * fake)


def test_interpolation_coefficients_are_uniform():
    alphas = recorded(lambda d: gradient_penalty(d, torch.ones(4000, 1), torch.zeros(4000, 1), generator=seeded()))
    torch.testing.assert_close(alphas.sort(0).values[:, 0], torch.linspace(0, 1, 4000), rtol=0, atol=0.03)


@pytest.mark.parametrize("noise", [0.5, 2.0, 0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dragan_perturbs_with_uniform_noise_scaled_by_the_batch_std(shape, noise):
    real = torch.randn(shape, dtype=torch.float64) * 3 + 1
    points = recorded(lambda d: dragan_penalty(d, real, noise=noise, generator=seeded()))
    generator = seeded()
    alpha = torch.rand(shape[0], *(1 for _ in shape[1:]), dtype=torch.float64, generator=generator)
    uniform = torch.rand(shape, dtype=torch.float64, generator=generator)
    deviation = (real - real.mean()).square().mean().sqrt()
    torch.testing.assert_close(points, real + (1 - alpha) * noise * deviation * uniform)


def test_dragan_of_one_constant_sample_is_unperturbed():
    real = torch.full((1, 3), 4.0)
    assert torch.equal(recorded(lambda d: dragan_penalty(d, real)), real)


@pytest.mark.parametrize("kind", ["gradient", "dragan", "path length"])
def test_random_generator_makes_penalties_reproducible(kind):
    network, samples = network_of(kind), torch.randn(5, 7, dtype=torch.float64)
    assert torch.equal(penalty_of(kind, network, samples, seed=3), penalty_of(kind, network, samples, seed=3))
    assert not torch.equal(penalty_of(kind, network, samples, seed=3), penalty_of(kind, network, samples, seed=4))


@pytest.mark.parametrize("kind", PENALTIES)
def test_arguments_and_parameters_are_not_modified(kind):
    network, samples, fake = network_of(kind), *torch.randn(2, 5, 7, dtype=torch.float64)
    fake.requires_grad_(kind == "gradient")
    leaf = samples.clone().requires_grad_(kind not in ("gradient", "dragan"))
    mean = torch.tensor(0.3)
    held = [leaf, fake, mean, *network.parameters(), *network.buffers()]
    before = [(t.detach().clone(), t.requires_grad, t._version) for t in held]
    penalty = {
        "gradient": lambda: gradient_penalty(network, leaf, fake),
        "dragan": lambda: dragan_penalty(network, leaf),
        "r1": lambda: r1_penalty(network(leaf), leaf),
        "r2": lambda: r2_penalty(network(leaf), leaf),
        "path length": lambda: path_length_penalty(network(leaf), leaf, mean)[0],
    }[kind]()
    assert penalty.requires_grad
    for tensor, (value, requires_grad, version) in zip(held, before, strict=True):
        assert torch.equal(tensor, value)
        assert (tensor.requires_grad, tensor._version) == (requires_grad, version)
        assert tensor.grad is None
    if kind in ("gradient", "dragan"):
        penalty.backward()
        assert leaf.grad is None
        assert fake.grad is None


# --------------------------------------------------------------------------------------------------
# Mixed precision


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


# --------------------------------------------------------------------------------------------------
# Errors

X = torch.randn(8, 3)
Z = torch.randn(8, 4)


def leaf(*shape):
    return torch.randn(*(shape or (8, 3)), requires_grad=True)


def sums(x):
    return x.flatten(1).sum(1)


def r1_of(scores, real=None):
    """R1 where the scores are a function of the real samples."""
    real = leaf() if real is None else real
    return r1_penalty(scores(real), real)


def path_of(images=None, latents=None, mean=0.0, **kwargs):
    latents = leaf(8, 4) if latents is None else latents
    images = (lambda z: z[..., None]) if images is None else images
    return path_length_penalty(images(latents), latents, mean, **kwargs)


def without_grad(call, mode=torch.no_grad):
    with mode():
        return call()


ERRORS = {
    # not tensors, not floating
    "real is a list": (lambda: gradient_penalty(sums, [1.0], X), TypeError, "^real: expected a tensor, got list"),
    "fake is None": (lambda: gradient_penalty(sums, X, None), TypeError, "^fake: expected a tensor, got NoneType"),
    "real is bytes": (
        lambda: gradient_penalty(sums, X.byte(), X),
        TypeError,
        r"^real: expected a floating-point tensor, got torch.uint8",
    ),
    "fake is integer": (
        lambda: gradient_penalty(sums, X, X.long()),
        TypeError,
        r"^fake: expected a floating-point tensor, got torch.int64",
    ),
    "dragan of a list": (lambda: dragan_penalty(sums, [1.0]), TypeError, "^real: expected a tensor, got list"),
    "dragan of bytes": (lambda: dragan_penalty(sums, X.byte()), TypeError, "^real: expected a floating-point tensor"),
    "r1 of a list": (lambda: r1_penalty(X.sum(1), [1.0]), TypeError, "^real: expected a tensor, got list"),
    "r2 of a list": (lambda: r2_penalty(X.sum(1), [1.0]), TypeError, "^fake: expected a tensor, got list"),
    "r2 of integers": (lambda: r2_penalty(X.sum(1), X.long()), TypeError, "^fake: expected a floating-point tensor"),
    "scores are a tuple": (lambda: r1_penalty((X,), leaf()), TypeError, "^scores: expected a tensor, got tuple"),
    "scores are integers": (
        lambda: r1_penalty(torch.zeros(8, dtype=torch.int64), leaf()),
        TypeError,
        r"^scores: expected a floating-point tensor, got torch.int64",
    ),
    "images are None": (
        lambda: path_length_penalty(None, leaf(8, 4), 0.0),
        TypeError,
        "^images: expected a tensor, got NoneType",
    ),
    "images are bytes": (lambda: path_of(lambda z: X.byte()), TypeError, "^images: expected a floating-point tensor"),
    "latents are a list": (
        lambda: path_length_penalty(X, [1.0], 0.0),
        TypeError,
        "^latents: expected a tensor, got list",
    ),
    "latents are integers": (
        lambda: path_length_penalty(X, Z.long(), 0.0),
        TypeError,
        "^latents: expected a floating-point tensor, got torch.int64",
    ),
    "the discriminator returns a tuple": (
        lambda: gradient_penalty(lambda x: (x,), X, X),
        TypeError,
        "^discriminator: expected it to return a tensor, got tuple",
    ),
    "the discriminator returns integers": (
        lambda: dragan_penalty(lambda x: sums(x).long(), X),
        TypeError,
        "^discriminator: expected it to return a floating-point tensor, got torch.int64",
    ),
    # shapes, dtypes and devices that differ
    "fake of another shape": (
        lambda: gradient_penalty(sums, X, X[:4]),
        ValueError,
        r"^fake: expected shape of real = \(8, 3\), got \(4, 3\)",
    ),
    "fake of another dtype": (
        lambda: gradient_penalty(sums, X, X.double()),
        TypeError,
        r"^fake: expected the dtype of real, torch.float32, got torch.float64",
    ),
    "fake on another device": (
        lambda: gradient_penalty(sums, X, X.to("meta")),
        ValueError,
        "^fake: expected the device of real, cpu, got meta",
    ),
    "images of another batch": (
        lambda: path_of(lambda z: z[:4, :, None]),
        ValueError,
        r"^images: expected as many samples as latents, 8, got \(4, 4, 1\)",
    ),
    # no samples, too few dims
    "gradient penalty of nothing": (
        lambda: gradient_penalty(sums, X[:0], X[:0]),
        ValueError,
        r"^real: expected \(B, \*\) with no empty dim, got \(0, 3\)",
    ),
    "dragan of nothing": (lambda: dragan_penalty(sums, X[:0]), ValueError, r"^real: expected .*got \(0, 3\)"),
    "r1 of nothing": (lambda: r1_of(sums, leaf(0, 3)), ValueError, r"^real: expected .*got \(0, 3\)"),
    "r2 of nothing": (lambda: r2_penalty(X[:0, 0], leaf(0, 3)), ValueError, r"^fake: expected .*got \(0, 3\)"),
    "r1 of empty samples": (lambda: r1_penalty(X.sum(1), leaf(8, 0)), ValueError, r"^real: expected .*got \(8, 0\)"),
    "path length of nothing": (
        lambda: path_of(latents=leaf(0, 4)),
        ValueError,
        r"^images: expected \(B, C, \*\) with no empty dim, got \(0, 4, 1\)",
    ),
    "real is a scalar": (lambda: r1_penalty(X.sum(1), leaf(1)[0]), ValueError, r"^real: expected \(B, \*\).*got \(\)"),
    "latents without a dim": (
        lambda: path_length_penalty(X, leaf(8), 0.0),
        ValueError,
        r"^latents: expected \(B, w\) or \(B, L, w\) with no empty dim, got \(8,\)",
    ),
    # scores that are not one per sample
    "scores of patches": (
        lambda: r1_of(lambda x: sums(x).reshape(8, 1, 1, 1).expand(8, 1, 30, 30)),
        ValueError,
        r"^scores: expected one score per sample, \(B,\) or \(B, 1\) with B = 8, got \(8, 1, 30, 30\);"
        r" reduce scores of patches first$",
    ),
    "scores of patches from the discriminator": (
        lambda: gradient_penalty(lambda x: x, X, X),
        ValueError,
        r"^discriminator: expected it to return one score per sample, \(B,\) or \(B, 1\) with B = 8, got \(8, 3\);"
        r" reduce scores of patches first$",
    ),
    "a mean of scores": (lambda: r1_of(lambda x: x.mean()), ValueError, r"^scores: expected one .*B = 8, got \(\)$"),
    "scores of another batch": (lambda: r1_of(lambda x: x[:4, 0]), ValueError, r"^scores: .*B = 8, got \(4,\)$"),
    "scores in a row": (lambda: r1_of(lambda x: sums(x)[None]), ValueError, r"^scores: .*B = 8, got \(1, 8\)$"),
    # nothing to differentiate
    "real does not require grad": (
        lambda: r1_penalty(X.sum(1), X),
        ValueError,
        r"^real: expected a tensor that requires grad \(call real.requires_grad_\(\) before the discriminator\),"
        " got one that does not",
    ),
    "fake does not require grad": (
        lambda: r2_penalty(X.sum(1), X),
        ValueError,
        r"^fake: expected a tensor that requires grad \(call fake.requires_grad_\(\) before the discriminator\)",
    ),
    "latents do not require grad": (
        lambda: path_of(latents=Z),
        ValueError,
        r"^latents: expected a tensor that requires grad \(call latents.requires_grad_\(\) before the generator\)",
    ),
    "detached scores": (
        lambda: r1_of(lambda x: sums(x).detach()),
        ValueError,
        r"^scores: expected values computed from real, got values that do not require grad \(computed under",
    ),
    "scores computed under no_grad": (
        lambda: r1_of(lambda x: without_grad(lambda: sums(x))),
        ValueError,
        "^scores: expected values computed from real, got values that do not require grad",
    ),
    "scores of something else": (
        lambda: r2_penalty(leaf().sum(1), leaf()),
        ValueError,
        r"^scores: expected values computed from fake, got values that do not depend on it \(or fake did not require"
        r" grad when they were computed\)$",
    ),
    "a discriminator under no_grad": (
        lambda: gradient_penalty(torch.no_grad()(sums), X, X),
        ValueError,
        "^discriminator: expected it to return values computed from its input, got values that do not require grad",
    ),
    "a discriminator that ignores its input": (
        lambda: dragan_penalty(lambda x: leaf().sum(1), X),
        ValueError,
        "^discriminator: expected it to return values computed from its input, got values that do not depend on it$",
    ),
    "detached images": (
        lambda: path_of(lambda z: z.detach()),
        ValueError,
        "^images: expected values computed from latents, got values that do not require grad",
    ),
    "images of something else": (
        lambda: path_of(lambda z: leaf()),
        ValueError,
        r"^images: expected values computed from latents, got values that do not depend on it \(or latents did",
    ),
    # gradients disabled
    "gradient penalty under no_grad": (
        lambda: without_grad(lambda: gradient_penalty(sums, X, X)),
        RuntimeError,
        r"^gradient_penalty: expected a call with gradients enabled, got one under torch.no_grad\(\) or",
    ),
    "dragan in inference mode": (
        lambda: without_grad(lambda: dragan_penalty(sums, X), torch.inference_mode),
        RuntimeError,
        "^dragan_penalty: expected a call with gradients enabled",
    ),
    "r1 under no_grad": (
        lambda: without_grad(lambda: r1_of(sums)),
        RuntimeError,
        "^r1_penalty: expected a call with gradients enabled",
    ),
    "r2 under no_grad": (
        lambda: without_grad(lambda: r2_penalty(sums(X), X)),
        RuntimeError,
        "^r2_penalty: expected a call with gradients enabled",
    ),
    "path length in inference mode": (
        lambda: without_grad(path_of, torch.inference_mode),
        RuntimeError,
        "^path_length_penalty: expected a call with gradients enabled",
    ),
    # numbers
    "a negative center": (
        lambda: gradient_penalty(sums, X, X, center=-1.0),
        ValueError,
        "^center: expected a finite number >= 0, got -1.0",
    ),
    "a negative center of dragan": (lambda: dragan_penalty(sums, X, center=-0.1), ValueError, "^center: .*got -0.1"),
    "a center that is no number": (
        lambda: gradient_penalty(sums, X, X, center=torch.ones(())),
        TypeError,
        "^center: expected a number, got Tensor",
    ),
    "negative noise": (
        lambda: dragan_penalty(sums, X, noise=-0.5),
        ValueError,
        "^noise: expected a finite number >= 0, got -0.5",
    ),
    "noise that is NaN": (lambda: dragan_penalty(sums, X, noise=math.nan), ValueError, "^noise: .*got nan"),
    "a decay of 0": (lambda: path_of(decay=0.0), ValueError, r"^decay: expected a number in \(0, 1\], got 0.0"),
    "a decay above 1": (lambda: path_of(decay=1.5), ValueError, r"^decay: expected a number in \(0, 1\], got 1.5"),
    "a mean of one dim": (
        lambda: path_of(mean=torch.zeros(1)),
        ValueError,
        r"^mean: expected a scalar tensor, of shape \(\), or a number, got \(1,\)",
    ),
    "an integer mean": (
        lambda: path_of(mean=torch.tensor(0)),
        TypeError,
        "^mean: expected a floating-point tensor, got torch.int64",
    ),
    "no mean": (
        lambda: path_of(mean=None),
        TypeError,
        "^mean: expected a scalar tensor or a number, got NoneType",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_invalid_arguments_raise(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message) as caught:
        call()
    assert type(caught.value) is error


# --------------------------------------------------------------------------------------------------
# Compiled modules


class Sum(nn.Module):
    """Sum of two modules applied to x, or to x and ``other``."""

    def __init__(self, first, second, other=None):
        super().__init__()
        self.first, self.second, self.other = first, second, other

    def forward(self, x):
        return self.first(x) + self.second(x if self.other is None else self.other)


@pytest.fixture(scope="module")
def compiled():
    """A compiled discriminator and a compiled generator."""
    networks = {"discriminator": critic((5, 7), torch.float32), "generator": decoder((5, 7), torch.float32)}
    yield {name: torch.compile(network, backend="aot_eager") for name, network in networks.items()}
    torch._dynamo.reset()


def compiled_of(kind, compiled):
    return compiled["generator" if kind == "path length" else "discriminator"]


NOT_TWICE = "values that are twice differentiable, got output of a module compiled with torch.compile; call the unc"


@pytest.mark.parametrize("kind", PENALTIES)
def test_compiled_modules_raise_and_their_original_module_works(compiled, kind):
    module, samples = compiled_of(kind, compiled), torch.randn(5, 7)
    begins = {"r1": "scores: expected", "r2": "scores: expected", "path length": "images: expected"}
    begin = begins.get(kind, "discriminator: expected it to return")
    with pytest.raises(RuntimeError, match=rf"^{begin} {NOT_TWICE}.*_orig_mod.*force_eager.*every 16th step"):
        penalty_of(kind, module, samples)
    plain = penalty_of(kind, module._orig_mod, samples)
    plain.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
    module.zero_grad()
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(penalty_of(kind, module, samples), plain)


def test_pytorch_does_not_support_double_backward_through_compiled_code(compiled):
    """If this fails, PyTorch supports double backward through compiled code, and the check can be removed."""
    x = torch.randn(5, 7, requires_grad=True)
    (gradient,) = torch.autograd.grad(compiled["discriminator"](x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.square().sum().backward()


def test_compiled_submodules_raise(compiled):
    plain, samples = critic((5, 7), torch.float32), torch.randn(5, 7)
    for network in (
        nn.Sequential(nn.Linear(7, 7), compiled["discriminator"], nn.Linear(1, 1)),
        Sum(plain, compiled["discriminator"]),
        Sum(compiled["discriminator"], plain),
    ):
        with pytest.raises(RuntimeError, match=NOT_TWICE):
            penalty_of("gradient", network, samples)


def test_compiled_code_outside_the_differentiated_path_is_allowed(compiled):
    plain, samples = critic((5, 7), torch.float32), torch.randn(5, 7)
    penalty = penalty_of("gradient", Sum(plain, compiled["discriminator"], other=leaf(5, 7)), samples)
    penalty.backward()
    torch.testing.assert_close(penalty, penalty_of("gradient", plain, samples))
    first, second = (leaf(10, 7) * 2).chunk(2)  # two outputs of one node
    penalty = r2_penalty(plain(first) + compiled["discriminator"](second), first)
    penalty.backward()
    torch.testing.assert_close(penalty, penalty_of("r1", plain, first))
    with pytest.raises(RuntimeError, match=NOT_TWICE):
        r2_penalty(plain(first) + compiled["discriminator"](second), second)
    fake = compiled["generator"](torch.randn(5, 7))
    network = critic((5, 2, 3, 3), torch.float32)
    penalty = r2_penalty(network(fake), fake)
    penalty.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in compiled["generator"].parameters())
    compiled["generator"].zero_grad()
    torch.testing.assert_close(penalty, penalty_of("r1", network, fake))


def test_graph_search_visits_each_edge_once():
    before = x = leaf(5, 7)
    for _ in range(100):
        x = x + 0.0
    y = x
    for _ in range(20):  # 2^20 paths from y to x
        y = y * 0.5 + y * 0.5
    edges = list(_input_gradient._edges([y.grad_fn], torch.autograd.graph.get_gradient_edge(x).node))
    assert len(edges) == 20 * 4
    assert list(_input_gradient._edges([x.grad_fn], torch.autograd.graph.get_gradient_edge(x).node)) == []
    assert len(list(_input_gradient._edges([x.grad_fn], torch.autograd.graph.get_gradient_edge(before).node))) == 100
    torch.testing.assert_close(r1_penalty(y.sum(1), x).detach(), torch.tensor(7 / 2))


# --------------------------------------------------------------------------------------------------
# The module


@pytest.mark.parametrize("module", [penalties, path_length])
def test_docstring_examples(module):
    results = doctest.testmod(module, extraglobs={"torch": torch, "fastgen": fastgen})
    assert results.attempted >= len(module.__all__)
    assert results.failed == 0
