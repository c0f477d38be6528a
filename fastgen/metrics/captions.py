"""Whether samples from captions look like the images that have these captions."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.metrics.bootstrap import bootstrap_interval
from fastgen.metrics.features import FeatureSpace
from fastgen.metrics.summary import Metric

BLOCK = 256  # samples whose distances are computed together


def caption_agreement(
    real: Tensor, generated: Tensor, captions: Tensor, space: FeatureSpace, *, resamples: int = 1000, seed: int = 0
) -> Metric:
    """Share of held-out images with another caption that are farther from a sample than the image of its caption.

    0.5 if samples do not depend on their captions, 1 if each sample is nearest to the image of its caption. Retrieval
    as in Xu et al. ("AttnGAN", 2018), by features of images instead of a text encoder's, and with the mean over ranks
    instead of the share of first ranks. The interval is over samples.

    Args:
        real: held-out images (N, C, S, S) in [0, 1].
        generated: image (N, C, S, S) in [0, 1] for each held-out image, sampled from its caption.
        captions: captions (N, T) int64 of the held-out images as tokens. Images of the same caption are not compared.
        space: feature space; distances are Euclidean.
        resamples: bootstrap resamples of the interval; 0: no interval.
        seed: random seed of the resampling.

    Raises:
        ValueError: if shapes do not match, images are not in [0, 1], or all captions are equal.
    """
    if generated.shape != real.shape:
        raise ValueError(f"generated: expected {tuple(real.shape)} as real, got {tuple(generated.shape)}")
    if captions.ndim != 2 or len(captions) != len(real):
        raise ValueError(f"captions: expected ({len(real)}, T), one for each image, got {tuple(captions.shape)}")
    numbers = captions.unique(dim=0, return_inverse=True)[1].cpu()
    if len(numbers) == 0 or bool((numbers == numbers[0]).all()):
        raise ValueError("captions: expected at least two different ones, got the same for all images")
    targets, features = space(real).double(), space(generated).double()
    shares = []
    for chosen in torch.arange(len(real)).split(BLOCK):
        distances = torch.cdist(features[chosen], targets, compute_mode="donot_use_mm_for_euclid_dist").cpu()
        own = distances[torch.arange(len(chosen)), chosen].unsqueeze(1)
        wins = (distances > own).double() + (distances == own).double() / 2
        others = numbers[chosen].unsqueeze(1) != numbers
        shares.append((wins * others).sum(1) / others.sum(1))
    share, n, note = torch.cat(shares), {"generated": len(real)}, "0.5: by chance"
    if not resamples:
        return Metric("caption agreement", float(share.mean()), space=space.name, n=n, note=note)
    interval = bootstrap_interval(share, resamples=resamples, seed=seed)
    return Metric("caption agreement", interval.estimate, interval.low, interval.high, space=space.name, n=n, note=note)
