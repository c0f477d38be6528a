"""How far generated items are from real ones, in a feature space: real (N, D), generated (M, D), any dtype.

All is computed in float64 on the device of the features (on the CPU where that has no float64), in blocks: nothing of
N x M x D numbers. torchmetrics has the first two for features that it extracts itself; from given features, of sets of
different sizes and with intervals, they are a few lines, and the tests hold them against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_NUMBERS = 2**22  # numbers of a block of a matrix of distances
SLACK = 1e-12  # of the squared norms: more than rounding does to a squared distance, so that copies stay together


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Squared 2-Wasserstein distance of the Gaussians with the sets' means and covariances.

    Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", 2017. Biased:
    it shrinks as the sets grow, so compare it only between sets of equal sizes.
    """
    real, generated = _pair(real, generated, fewest=2)
    return float(resampled_frechet(real, generated, *_once(real, generated)))


def kernel_distance(real: Tensor, generated: Tensor) -> float:
    """Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, unbiased: below 0 for sets alike.

    Binkowski et al., "Demystifying MMD GANs", 2018; there it is averaged over subsets, here the sets are used whole.
    """
    real, generated = _pair(real, generated, fewest=2)
    return float(resampled_kernel(real, generated, *_once(real, generated)))


def resampled_frechet(real: Tensor, generated: Tensor, real_counts: Tensor, generated_counts: Tensor) -> Tensor:
    """``frechet_distance`` of R resampled pairs of sets: counts (R, N) and (R, M) of the items -> (R,)."""
    real, generated = _pair(real, generated, fewest=2)
    distances = []
    for a, b in zip(real_counts.to(real), generated_counts.to(real), strict=True):
        mean_a, root_a = _moments(real, a)
        mean_b, root_b = _moments(generated, b)
        # tr (A B)^1/2 is the nuclear norm of a b^T for any roots A = a^T a and B = b^T b: no square root of a
        # matrix that rounding made indefinite, and exact cancellation for equal sets.
        cross = torch.linalg.matrix_norm(root_a @ root_b.mT, "nuc")
        distances.append((mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross)
    return torch.stack(distances).clamp(min=0).cpu()


def _moments(features: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,), and a root (min(N, D), D) of the covariance: covariance = root^T root."""
    drawn = counts > 0
    features, counts = features[drawn], counts[drawn]
    mean = counts @ features / counts.sum()
    rows = (features - mean) * (counts / (counts.sum() - 1)).sqrt()[:, None]
    return mean, torch.linalg.qr(rows, mode="r").R


def resampled_kernel(real: Tensor, generated: Tensor, real_counts: Tensor, generated_counts: Tensor) -> Tensor:
    """``kernel_distance`` of R resampled pairs of sets: counts (R, N) and (R, M) of the items -> (R,).

    Pairs of an item with its own copies are left out, as pairs of an item with itself are: they would add a bias.
    """
    real, generated = _pair(real, generated, fewest=2)
    a, b = real_counts.to(real), generated_counts.to(real)
    cross = _kernel_sum(real, generated, a, b) / (a.sum(1) * b.sum(1))
    return (_within(real, a) + _within(generated, b) - 2 * cross).cpu()


def _within(features: Tensor, counts: Tensor) -> Tensor:
    """(R,) means of the kernel over pairs of different items."""
    itself = (features.square().sum(1) / features.shape[1] + 1) ** 3
    square = counts.square()
    return (_kernel_sum(features, features, counts, counts) - square @ itself) / (counts.sum(1) ** 2 - square.sum(1))


def _kernel_sum(a: Tensor, b: Tensor, counts_a: Tensor, counts_b: Tensor) -> Tensor:
    """(R,) sum over i, j of counts_a[r, i] k(a_i, b_j) counts_b[r, j]."""
    total = counts_a.new_zeros(len(counts_a))
    block = _rows(len(b))
    for rows, counts in zip(a.split(block), counts_a.split(block, dim=1), strict=True):
        kernel = (rows @ b.mT / a.shape[1] + 1) ** 3
        total += (counts @ kernel * counts_b).sum(1)
    return total


@dataclass(frozen=True)
class Neighbourhoods:
    """Which items lie in the other set's manifold: the union of spheres that reach to the k-th neighbour in a set.

    precise: (M,) generated items inside the manifold of the real ones. recalled: (N,) real items inside that of the
    generated ones. spheres: (M,) spheres of real items around a generated one, over k. covered: (N,) real items with
    a generated one in their own sphere.
    """

    precise: Tensor
    recalled: Tensor
    spheres: Tensor
    covered: Tensor

    @property
    def precision(self) -> float:
        """How much of what is generated is like something real."""
        return float(self.precise.double().mean())

    @property
    def recall(self) -> float:
        """How much of what is real is like something generated."""
        return float(self.recalled.double().mean())

    @property
    def density(self) -> float:
        """As precision, but counts how densely real items lie there; around 1 for equal distributions, can be more."""
        return float(self.spheres.mean())

    @property
    def coverage(self) -> float:
        """As recall, but by spheres of real items alone, so that a stray generated one covers nothing."""
        return float(self.covered.double().mean())


def neighbourhoods(real: Tensor, generated: Tensor, *, k: int = 5) -> Neighbourhoods:
    """What precision, recall, density and coverage are means of.

    Kynkaanniemi et al., "Improved precision and recall metric for assessing generative models", 2019; Naeem et al.,
    "Reliable fidelity and diversity metrics for generative models", 2020. A point on a sphere is inside. Each set
    needs more than k items.
    """
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected a whole number of at least 1, got {k!r}")
    real, generated = _pair(real, generated, fewest=k + 1)
    centre = real.mean(0)  # distances don't see it, their rounding does
    real, generated = real - centre, generated - centre
    real_radii, generated_radii = _radii(real, k), _radii(generated, k)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered, spheres = recalled.clone(), []
    block = _rows(len(real))
    for rows, radii in zip(generated.split(block), generated_radii.split(block), strict=True):
        distance = _squared(rows, real, slack=SLACK)
        inside = distance <= real_radii
        spheres.append(inside.sum(1))
        covered |= inside.any(0)
        recalled |= (distance <= radii[:, None]).any(0)
    count = torch.cat(spheres)
    return Neighbourhoods((count > 0).cpu(), recalled.cpu(), (count.double() / k).cpu(), covered.cpu())


def _radii(features: Tensor, k: int) -> Tensor:
    """(N,) squared distance of each item to its k-th nearest other one."""
    radii = []
    block = _rows(len(features))
    for start, rows in zip(range(0, len(features), block), features.split(block), strict=True):
        distance = _squared(rows, features)
        distance.diagonal(start).fill_(torch.inf)
        radii.append(distance.kthvalue(k).values)
    return torch.cat(radii)


def _squared(a: Tensor, b: Tensor, slack: float = 0.0) -> Tensor:
    """|a_i - b_j|^2, less the slack."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    return torch.addmm(norms * (1 - slack), a, b.mT, alpha=-2)


def _rows(columns: int) -> int:
    return max(1, MOST_NUMBERS // columns)


def _once(real: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
    return real.new_ones(1, len(real)), generated.new_ones(1, len(generated))


def _pair(real: Tensor, generated: Tensor, fewest: int) -> tuple[Tensor, Tensor]:
    sets = []
    for name, features in (("real", real), ("generated", generated)):
        if not isinstance(features, Tensor) or features.ndim != 2 or not features.shape[1]:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"{name}: expected features (N, D), got {got}")
        if len(features) < fewest:
            raise ValueError(f"{name}: expected at least {fewest} items, got {len(features)}")
        features = features.detach()
        features = (features.cpu() if features.device.type == "mps" else features).double()
        bad = int((~features.isfinite()).any(1).sum())
        if bad:
            raise ValueError(f"{name}: expected finite features, got {bad} of {len(features)} items NaN or infinite")
        sets.append(features)
    if sets[0].shape[1] != sets[1].shape[1] or sets[0].device != sets[1].device:
        wanted, found = (f"{features.shape[1]} dims on {features.device}" for features in sets)
        raise ValueError(f"generated: expected {wanted} as the real ones, got {found}")
    return sets[0], sets[1]
