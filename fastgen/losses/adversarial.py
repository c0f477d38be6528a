"""Adversarial losses of discriminator and generator. Scores are logits; a high score means real.

D is the discriminator, x are real samples, x~ generated samples, s(t) = log(1 + e^t):

    kind             discriminator                                   generator
    minimax          E[s(-D(x))] + E[s(D(x~))]                       -E[s(D(x~))]
    non-saturating   same as minimax                                 E[s(-D(x~))]
    least-squares    1/2 E[(D(x) - 1)^2] + 1/2 E[D(x~)^2]            1/2 E[(D(x~) - 1)^2]
    hinge            E[max(0, 1 - D(x))] + E[max(0, 1 + D(x~))]      -E[D(x~)]
    wasserstein      E[D(x~)] - E[D(x)]                              -E[D(x~)]

minimax and non-saturating: Goodfellow et al., "Generative adversarial nets" (2014), section 3, with D their logit.
least-squares: Mao et al., "Least squares generative adversarial networks" (2017), equation 9. hinge: Lim and Ye,
"Geometric GAN" (2017). wasserstein: Arjovsky et al., "Wasserstein generative adversarial networks" (2017); it requires
a Lipschitz discriminator, see ``gradient_penalty``.

Losses are means over all scores, in float32, or float64 for float64 scores, also under autocast. They are NaN if any
score is NaN or infinite.
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
_WIDE = (torch.float32, torch.float64)


def _check_kind(kind: str) -> None:
    if kind not in ADVERSARIAL_LOSSES:
        raise ValueError(f"kind: expected one of {', '.join(ADVERSARIAL_LOSSES)}, got {kind!r}")


def _upcast_scores(name: str, scores: Tensor) -> Tensor:
    """Scores in float32, or float64 for float64. Infinite scores (overflow) become NaN."""
    check.require_tensor(name, scores)
    check.require_floating(name, scores)
    if scores.numel() == 0:
        raise ValueError(f"{name}: expected at least one score, got {check.shape_of(scores)}")
    upcast = scores if scores.dtype in _WIDE else scores.float()
    return upcast + 0 * upcast.detach()


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), accurate in float64. (``F.softplus`` is linear above 20, which float32 does not tell apart.)"""
    return F.softplus(x) if x.dtype == torch.float32 else -F.logsigmoid(-x)


def discriminator_loss(real_scores: Tensor, fake_scores: Tensor, kind: AdversarialLoss = "non-saturating") -> Tensor:
    """Adversarial loss of the discriminator.

    With the discriminator D, real samples x, generated samples x~ and s(t) = log(1 + e^t):

    - ``"minimax"``, ``"non-saturating"``: ``E[s(-D(x))] + E[s(D(x~))]`` (Goodfellow et al., 2014)
    - ``"least-squares"``: ``1/2 E[(D(x) - 1)^2] + 1/2 E[D(x~)^2]`` (Mao et al., 2017)
    - ``"hinge"``: ``E[max(0, 1 - D(x))] + E[max(0, 1 + D(x~))]`` (Lim and Ye, 2017)
    - ``"wasserstein"``: ``E[D(x~)] - E[D(x)]`` (Arjovsky et al., 2017)

    Args:
        real_scores: logits of real samples, of any shape: (B,), (B, 1), or scores of patches.
        fake_scores: logits of generated samples, which should be detached from the generator. The number of real
            and generated samples may differ.
        kind: adversarial loss.

    Returns:
        A scalar in float32, or float64 for float64 scores.

    Raises:
        TypeError: if scores are not floating-point tensors, or dtypes differ.
        ValueError: if ``kind`` is unknown, there are no scores, or devices differ.

    Example:
        >>> discriminator_loss(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0]), "hinge")
        tensor(0.7500)
    """
    _check_kind(kind)
    real, fake = _upcast_scores("real_scores", real_scores), _upcast_scores("fake_scores", fake_scores)
    check.require_alike("real_scores", real_scores, fake_scores=fake_scores)
    if kind == "least-squares":
        return 0.5 * ((real - 1).square().mean() + fake.square().mean())
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if kind == "wasserstein":
        return fake.mean() - real.mean()
    return _softplus(-real).mean() + _softplus(fake).mean()


def generator_loss(fake_scores: Tensor, kind: AdversarialLoss = "non-saturating") -> Tensor:
    """Adversarial loss of the generator.

    With the discriminator D, generated samples x~ and s(t) = log(1 + e^t):

    - ``"minimax"``: ``-E[s(D(x~))]``
    - ``"non-saturating"``: ``E[s(-D(x~))]``
    - ``"least-squares"``: ``1/2 E[(D(x~) - 1)^2]``
    - ``"hinge"``, ``"wasserstein"``: ``-E[D(x~)]``

    See ``discriminator_loss`` for sources.

    Args:
        fake_scores: logits of generated samples, of any shape: (B,), (B, 1), or scores of patches.
        kind: adversarial loss.

    Returns:
        A scalar in float32, or float64 for float64 scores.

    Raises:
        TypeError: if scores are not a floating-point tensor.
        ValueError: if ``kind`` is unknown, or there are no scores.

    Example:
        >>> generator_loss(torch.tensor([2.0, -1.0]), "wasserstein")
        tensor(-0.5000)
    """
    _check_kind(kind)
    fake = _upcast_scores("fake_scores", fake_scores)
    if kind == "minimax":
        return -_softplus(fake).mean()
    if kind == "non-saturating":
        return _softplus(-fake).mean()
    if kind == "least-squares":
        return 0.5 * (fake - 1).square().mean()
    return -fake.mean()
