"""Adversarial losses: values, derivatives, precision, errors."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastgen
from fastgen import losses
from fastgen.losses import adversarial, discriminator_loss, generator_loss
from fastgen.losses.adversarial import ADVERSARIAL_LOSSES

REAL = torch.tensor([1.5, -0.5, 0.25], dtype=torch.float64)
FAKE = torch.tensor([-2.0, 0.5], dtype=torch.float64)


def mean(*values):
    return sum(values) / len(values)


def softplus(x):
    return math.log1p(math.exp(x))


CROSS_ENTROPY = mean(softplus(-1.5), softplus(0.5), softplus(-0.25)) + mean(softplus(-2.0), softplus(0.5))
VALUES = {
    "minimax": (CROSS_ENTROPY, -mean(softplus(-2.0), softplus(0.5))),
    "non-saturating": (CROSS_ENTROPY, mean(softplus(2.0), softplus(-0.5))),
    "least-squares": (0.5 * mean(0.25, 2.25, 0.5625) + 0.5 * mean(4.0, 0.25), 0.5 * mean(9.0, 0.25)),
    "hinge": (mean(0.0, 1.5, 0.75) + mean(0.0, 1.5), 0.75),
    "wasserstein": (-0.75 - 1.25 / 3, 0.75),
}
SHAPES = {"B": (12,), "B1": (12, 1), "patches": (2, 1, 3, 2), "one": ()}


@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
def test_losses_match_closed_form_values(kind):
    discriminator, generator = VALUES[kind]
    torch.testing.assert_close(discriminator_loss(REAL, FAKE, kind).item(), discriminator, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(generator_loss(FAKE, kind).item(), generator, rtol=1e-14, atol=1e-14)


def test_minimax_and_non_saturating_match_their_definition_with_probabilities():
    """Goodfellow et al. define them with probabilities, log D and log(1 - D)."""
    real, fake = REAL.sigmoid(), FAKE.sigmoid()
    minimax = -(real.log().mean() + (1 - fake).log().mean())
    for kind in ("minimax", "non-saturating"):
        torch.testing.assert_close(discriminator_loss(REAL, FAKE, kind), minimax)
    torch.testing.assert_close(generator_loss(FAKE, "minimax"), (1 - fake).log().mean())
    torch.testing.assert_close(generator_loss(FAKE, "non-saturating"), -fake.log().mean())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
def test_losses_are_means_over_all_scores(kind, shape):
    size = SHAPES[shape]
    real, fake = torch.randn(2, *size, dtype=torch.float64)
    torch.testing.assert_close(
        discriminator_loss(real, fake, kind), discriminator_loss(real.flatten(), fake.flatten(), kind)
    )
    assert discriminator_loss(real, fake, kind).shape == generator_loss(fake, kind).shape == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
def test_large_scores_have_finite_losses_and_gradients(kind, dtype):
    """6e4 is near the largest float16 number; squares and sums would overflow."""
    scores = torch.tensor([-6e4, -30.0, 30.0, 6e4], dtype=dtype, requires_grad=True)
    upcast = torch.promote_types(dtype, torch.float32)
    for sign in (1, -1):
        loss = discriminator_loss(scores * sign, -scores * sign, kind) + generator_loss(scores, kind)
        assert loss.dtype == upcast
        (gradient,) = torch.autograd.grad(loss, scores)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()
    if kind == "non-saturating":
        (gradient,) = torch.autograd.grad(generator_loss(scores, kind), scores)
        torch.testing.assert_close(gradient[:2].double(), torch.full((2,), -0.25, dtype=torch.float64))


@pytest.mark.parametrize("score", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
def test_non_finite_scores_make_the_loss_nan(kind, score):
    bad, good = torch.tensor([score, 1.0]), torch.zeros(2)
    assert bool(discriminator_loss(bad, good, kind).isnan())
    assert bool(discriminator_loss(good, bad, kind).isnan())
    assert bool(generator_loss(bad, kind).isnan())


@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
def test_autocast_losses_are_float32(kind):
    real, fake = torch.randn(2, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        results = discriminator_loss(real, fake, kind), generator_loss(fake, kind)
    wanted = discriminator_loss(real.float(), fake.float(), kind), generator_loss(fake.float(), kind)
    torch.testing.assert_close(results, wanted)


@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
def test_first_and_second_derivatives(kind):
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    for function, inputs in (
        (lambda r, f: discriminator_loss(r, f, kind), (real, fake)),
        (lambda f: generator_loss(f, kind), (fake,)),
    ):
        assert gradcheck(function, inputs, check_forward_ad=True)
        assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
def test_gradients_have_the_expected_signs(kind):
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    grad_real, grad_fake = torch.autograd.grad(discriminator_loss(real, fake, kind), (real, fake))
    (grad_generator,) = torch.autograd.grad(generator_loss(fake, kind), fake)
    assert (grad_real < 0).all()
    assert (grad_fake > 0).all() or kind == "least-squares"  # 0 is the target of least-squares
    assert (grad_generator < 0).all()


ERRORS = {
    "unknown kind, discriminator": (
        lambda: discriminator_loss(REAL, FAKE, "unknown"),
        ValueError,
        "^kind: expected one of minimax, non-saturating, .*, wasserstein, got 'unknown'$",
    ),
    "unknown kind, generator": (lambda: generator_loss(FAKE, None), ValueError, "^kind: .*got None$"),
    "real scores in a list": (
        lambda: discriminator_loss([1.0], FAKE),
        TypeError,
        "^real_scores: expected a tensor, got list",
    ),
    "integers": (
        lambda: generator_loss(torch.ones(3, dtype=torch.int64)),
        TypeError,
        "^fake_scores: expected a floating-point tensor, got torch.int64",
    ),
    "no scores": (
        lambda: discriminator_loss(REAL, FAKE[:0]),
        ValueError,
        r"^fake_scores: expected at least one score, got \(0,\)$",
    ),
    "dtypes that differ": (
        lambda: discriminator_loss(REAL, FAKE.float()),
        TypeError,
        "^fake_scores: expected the dtype of real_scores, torch.float64, got torch.float32",
    ),
    "devices that differ": (
        lambda: discriminator_loss(REAL, FAKE.to("meta")),
        ValueError,
        "^fake_scores: expected the device of real_scores, cpu, got meta",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_invalid_arguments_raise(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        call()


def test_docstring_examples():
    results = doctest.testmod(adversarial, extraglobs={"torch": torch})
    assert results.attempted >= len(adversarial.__all__)
    assert results.failed == 0


def test_all_lists_every_loss():
    assert fastgen.losses is losses
    assert losses.__all__ == sorted(adversarial.__all__ + losses.penalties.__all__ + losses.path_length.__all__)
