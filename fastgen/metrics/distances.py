"""Distances between sets of features: real (N, D) and generated (M, D), of any floating-point dtype.

Everything is computed in float64 on the device of the features (on the CPU if the device does not support float64), in
blocks of limited memory. Frechet and kernel distance are tested against torchmetrics, which does not compute them from
given features with confidence intervals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ELEMENTS = 2**22  # elements of a block of a distance matrix
RELATIVE_TOLERANCE = 1e-12  # of squared distances: above rounding errors, so that copies have distance 0


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Frechet distance: squared 2-Wasserstein distance between Gaussians fitted to the two sets.

    Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium" (2017). With
    Inception features, this is the FID. The estimate is biased and decreases with the number of items: compare
    distances only between sets of equal sizes.

    Args:
        real: features (N, D) with N >= 2.
        generated: features (M, D) with M >= 2.

    Returns:
        The distance.

    Raises:
        ValueError: if features are not two matrices with the same D, or are NaN or infinite.

    Example:
        >>> features = torch.tensor([[0.0], [2.0]])
        >>> round(frechet_distance(features, features + 3), 6)
        9.0
    """
    real, generated = _check_features(real, generated, minimum=2)
    return float(resampled_frechet(real, generated, *_unit_counts(real, generated)))


def kernel_distance(real: Tensor, generated: Tensor) -> float:
    """Kernel distance: unbiased squared maximum mean discrepancy (MMD) with the kernel ``(x.y / D + 1)^3``.

    Binkowski et al., "Demystifying MMD GANs" (2018). With Inception features, this is the KID, but computed from the
    whole sets instead of averaged over subsets. The estimate may be negative for similar distributions.

    Args:
        real: features (N, D) with N >= 2.
        generated: features (M, D) with M >= 2.

    Returns:
        The distance.

    Raises:
        ValueError: if features are not two matrices with the same D, or are NaN or infinite.
    """
    real, generated = _check_features(real, generated, minimum=2)
    return float(resampled_kernel(real, generated, *_unit_counts(real, generated)))


def resampled_frechet(real: Tensor, generated: Tensor, real_counts: Tensor, generated_counts: Tensor) -> Tensor:
    """Frechet distances (R,) of R resampled pairs of sets, given by counts (R, N) and (R, M) of the items."""
    real, generated = _check_features(real, generated, minimum=2)
    distances = []
    for a, b in zip(real_counts.to(real), generated_counts.to(real), strict=True):
        mean_a, root_a = _moments(real, a)
        mean_b, root_b = _moments(generated, b)
        # For roots A = a^T a and B = b^T b, tr (A B)^1/2 is the nuclear norm of a b^T. This avoids the square root of
        # a matrix that may be indefinite due to rounding, and is exactly 0 for equal sets.
        cross = torch.linalg.matrix_norm(root_a @ root_b.mT, "nuc")
        distances.append((mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross)
    return torch.stack(distances).clamp(min=0).cpu()


def _moments(features: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and root (min(N, D), D) of the covariance, covariance = root^T root."""
    sampled = counts > 0
    features, counts = features[sampled], counts[sampled]
    mean = counts @ features / counts.sum()
    rows = (features - mean) * (counts / (counts.sum() - 1)).sqrt()[:, None]
    return mean, torch.linalg.qr(rows, mode="r").R


def resampled_kernel(real: Tensor, generated: Tensor, real_counts: Tensor, generated_counts: Tensor) -> Tensor:
    """Kernel distances (R,) of R resampled pairs of sets, given by counts (R, N) and (R, M) of the items.

    Pairs of an item with its own copies are excluded, like pairs of an item with itself, to keep the estimate unbiased.
    """
    real, generated = _check_features(real, generated, minimum=2)
    a, b = real_counts.to(real), generated_counts.to(real)
    cross = _kernel_sum(real, generated, a, b) / (a.sum(1) * b.sum(1))
    return (_mean_kernel(real, a) + _mean_kernel(generated, b) - 2 * cross).cpu()


def _mean_kernel(features: Tensor, counts: Tensor) -> Tensor:
    """Means (R,) of the kernel over pairs of different items."""
    diagonal = (features.square().sum(1) / features.shape[1] + 1) ** 3
    square = counts.square()
    return (_kernel_sum(features, features, counts, counts) - square @ diagonal) / (counts.sum(1) ** 2 - square.sum(1))


def _kernel_sum(a: Tensor, b: Tensor, counts_a: Tensor, counts_b: Tensor) -> Tensor:
    """Sums (R,) over i, j of counts_a[r, i] k(a_i, b_j) counts_b[r, j]."""
    total = counts_a.new_zeros(len(counts_a))
    block = _block_size(len(b))
    for rows, counts in zip(a.split(block), counts_a.split(block, dim=1), strict=True):
        kernel = (rows @ b.mT / a.shape[1] + 1) ** 3
        total += (counts @ kernel * counts_b).sum(1)
    return total


@dataclass(frozen=True)
class Neighborhoods:
    """Items inside the k-nearest-neighbor manifold of the other set; see ``neighborhoods``.

    The manifold of a set is the union of spheres around its items that reach to the k-th nearest neighbor.

    Attributes:
        precise: (M,) bool, generated items inside the manifold of the real items.
        recalled: (N,) bool, real items inside the manifold of the generated items.
        spheres: (M,) number of spheres of real items that contain each generated item, divided by k.
        covered: (N,) bool, real items whose sphere contains a generated item.
    """

    precise: Tensor
    recalled: Tensor
    spheres: Tensor
    covered: Tensor

    @property
    def precision(self) -> float:
        """Fraction of generated items inside the manifold of the real items."""
        return float(self.precise.double().mean())

    @property
    def recall(self) -> float:
        """Fraction of real items inside the manifold of the generated items."""
        return float(self.recalled.double().mean())

    @property
    def density(self) -> float:
        """Mean number of spheres of real items around a generated item, over k: about 1 for equal distributions."""
        return float(self.spheres.mean())

    @property
    def coverage(self) -> float:
        """Fraction of real items whose sphere contains a generated item. Robust to generated outliers."""
        return float(self.covered.double().mean())


def neighborhoods(real: Tensor, generated: Tensor, *, k: int = 5) -> Neighborhoods:
    """Precision, recall, density and coverage from k-nearest-neighbor manifolds.

    Precision and recall: Kynkaanniemi et al., "Improved precision and recall metric for assessing generative models"
    (2019). Density and coverage: Naeem et al., "Reliable fidelity and diversity metrics for generative models" (2020).
    Points on a sphere are inside.

    Args:
        real: features (N, D) with N > k.
        generated: features (M, D) with M > k.
        k: number of nearest neighbors.

    Returns:
        The memberships of all items, with the four metrics as properties.

    Raises:
        ValueError: if k is not positive, or features are not two matrices with the same D, too few, NaN or infinite.

    Example:
        >>> real = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> neighborhoods(real, torch.tensor([[0.5], [20.0]]), k=1).precision
        0.5
    """
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected a whole number of at least 1, got {k!r}")
    real, generated = _check_features(real, generated, minimum=k + 1)
    mean = real.mean(0)  # centering reduces rounding errors of distances
    real, generated = real - mean, generated - mean
    real_radii, generated_radii = _radii(real, k), _radii(generated, k)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered, spheres = recalled.clone(), []
    block = _block_size(len(real))
    for rows, radii in zip(generated.split(block), generated_radii.split(block), strict=True):
        distance = _squared_distances(rows, real, tolerance=RELATIVE_TOLERANCE)
        inside = distance <= real_radii
        spheres.append(inside.sum(1))
        covered |= inside.any(0)
        recalled |= (distance <= radii[:, None]).any(0)
    count = torch.cat(spheres)
    return Neighborhoods((count > 0).cpu(), recalled.cpu(), (count.double() / k).cpu(), covered.cpu())


def nearest(items: Tensor, others: Tensor) -> Tensor:
    """Index (N,) of the nearest row of others (M, D) to each row of items (N, D)."""
    mean = others.float().mean(0)  # centering reduces rounding errors of distances
    others = others.float() - mean
    blocks = (items.float() - mean).split(_block_size(len(others)))
    return torch.cat([_squared_distances(rows, others).argmin(1) for rows in blocks])


def _radii(features: Tensor, k: int) -> Tensor:
    """Squared distance (N,) of each item to its k-th nearest neighbor."""
    radii = []
    block = _block_size(len(features))
    for start, rows in zip(range(0, len(features), block), features.split(block), strict=True):
        distance = _squared_distances(rows, features)
        distance.diagonal(start).fill_(torch.inf)
        radii.append(distance.kthvalue(k).values)
    return torch.cat(radii)


def _squared_distances(a: Tensor, b: Tensor, tolerance: float = 0.0) -> Tensor:
    """|a_i - b_j|^2 up to a relative ``tolerance``."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    return torch.addmm(norms * (1 - tolerance), a, b.mT, alpha=-2)


def _block_size(columns: int) -> int:
    return max(1, MAX_ELEMENTS // columns)


def _unit_counts(real: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
    return real.new_ones(1, len(real)), generated.new_ones(1, len(generated))


def _check_features(real: Tensor, generated: Tensor, minimum: int) -> tuple[Tensor, Tensor]:
    sets = []
    for name, features in (("real", real), ("generated", generated)):
        if not isinstance(features, Tensor) or features.ndim != 2 or not features.shape[1]:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"{name}: expected features (N, D), got {got}")
        if len(features) < minimum:
            raise ValueError(f"{name}: expected at least {minimum} items, got {len(features)}")
        features = features.detach()
        features = (features.cpu() if features.device.type == "mps" else features).double()
        bad = int((~features.isfinite()).any(1).sum())
        if bad:
            raise ValueError(f"{name}: expected finite features, got {bad} of {len(features)} items NaN or infinite")
        sets.append(features)
    if sets[0].shape[1] != sets[1].shape[1] or sets[0].device != sets[1].device:
        expected, actual = (f"{features.shape[1]} dims on {features.device}" for features in sets)
        raise ValueError(f"generated: expected {expected}, as in real, got {actual}")
    return sets[0], sets[1]
