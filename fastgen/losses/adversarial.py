"""What the two players of adversarial training minimise. Scores are logits: high means real.

Five games, D the score of real samples x and generated ones x~, s(t) = log(1 + e^t):

    kind             discriminator                                   generator
    minimax          E[s(-D(x))] + E[s(D(x~))]                       -E[s(D(x~))]
    non-saturating   the same                                        E[s(-D(x~))]
    least-squares    1/2 E[(D(x) - 1)^2] + 1/2 E[D(x~)^2]            1/2 E[(D(x~) - 1)^2]
    hinge            E[max(0, 1 - D(x))] + E[max(0, 1 + D(x~))]      -E[D(x~)]
    wasserstein      E[D(x~)] - E[D(x)]                              -E[D(x~)]

minimax and non-saturating: Goodfellow et al., "Generative adversarial nets" (2014), section 3, with D their logit.
least-squares: Mao et al., "Least squares generative adversarial networks" (2017), equation 9. hinge: Lim and Ye,
"Geometric GAN" (2017). wasserstein: Arjovsky et al., "Wasserstein generative adversarial networks" (2017); it wants
a discriminator whose slope is bounded, as ``gradient_penalty`` does.

Each returns one number, the mean over all scores, in float32, or float64 for float64 scores, also under autocast. It is
NaN where a score is NaN or infinite, also where the limit would be finite: the discriminator has overflowed.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import checks as check

__all__ = ["discriminator_loss", "generator_loss"]

AdversarialLoss = Literal["minimax", "non-saturating", "least-squares", "hinge", "wasserstein"]
ADVERSARIAL_LOSSES: tuple[str, ...] = get_args(AdversarialLoss)


def _check_kind(kind: str) -> None:
    if kind not in ADVERSARIAL_LOSSES:
        raise ValueError(f"kind: expected one of {', '.join(ADVERSARIAL_LOSSES)}, got {kind!r}")


def _wide_scores(name: str, scores: Tensor) -> Tensor:
    """The scores in float32; float64 stays. Infinite ones, which have overflowed, become NaN."""
    check.require_tensor(name, scores)
    check.require_floating(name, scores)
    if scores.numel() == 0:
        raise ValueError(f"{name}: expected at least one score, got {check.shape_of(scores)}")
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return wide + 0 * wide.detach()


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), exact at both ends; torch's own turns linear at 20, which float64 would see."""
    return -F.logsigmoid(-x)


def discriminator_loss(real_scores: Tensor, fake_scores: Tensor, kind: AdversarialLoss = "non-saturating") -> Tensor:
    """What the discriminator minimises; the formulas are at the top of this file.

    Args:
        real_scores: logits of real samples: (B,), (B, 1), or of patches in any shape.
        fake_scores: those of generated samples, computed from detached samples; as many or another number.
        kind: the game.

    Returns:
        A scalar.

    Raises:
        TypeError: scores that are not floating tensors, or dtypes that differ.
        ValueError: an unknown kind, no scores, devices that differ.

    Example:
        >>> discriminator_loss(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0]), "hinge")
        tensor(0.7500)
    """
    _check_kind(kind)
    real, fake = _wide_scores("real_scores", real_scores), _wide_scores("fake_scores", fake_scores)
    check.require_alike("real_scores", real_scores, fake_scores=fake_scores)
    if kind == "least-squares":
        return 0.5 * ((real - 1).square().mean() + fake.square().mean())
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if kind == "wasserstein":
        return fake.mean() - real.mean()
    return _softplus(-real).mean() + _softplus(fake).mean()


def generator_loss(fake_scores: Tensor, kind: AdversarialLoss = "non-saturating") -> Tensor:
    """What the generator minimises; the formulas are at the top of this file.

    Args:
        fake_scores: logits of generated samples: (B,), (B, 1), or of patches in any shape.
        kind: the game.

    Returns:
        A scalar.

    Raises:
        TypeError: scores that are not a floating tensor. ValueError: an unknown kind, or no scores.

    Example:
        >>> generator_loss(torch.tensor([2.0, -1.0]), "wasserstein")
        tensor(-0.5000)
    """
    _check_kind(kind)
    fake = _wide_scores("fake_scores", fake_scores)
    if kind == "minimax":
        return -_softplus(fake).mean()
    if kind == "non-saturating":
        return _softplus(-fake).mean()
    if kind == "least-squares":
        return 0.5 * (fake - 1).square().mean()
    return -fake.mean()
