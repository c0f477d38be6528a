"""Gradient penalties and path length: values, derivatives, sampling."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap

import fastgen
from fastgen.losses import (
    dragan_penalty,
    gradient_penalty,
    path_length,
    path_length_penalty,
    penalties,
    r1_penalty,
    r2_penalty,
)
from tests.losses.penalty_cases import PENALTIES, SHAPES, critic, network_of, penalty_of, seeded

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
# Docstrings


@pytest.mark.parametrize("module", [penalties, path_length])
def test_docstring_examples(module):
    results = doctest.testmod(module, extraglobs={"torch": torch, "fastgen": fastgen})
    assert results.attempted >= len(module.__all__)
    assert results.failed == 0
