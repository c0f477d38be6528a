"""Harmonicity of sounds: fraction of the energy at the harmonics of one pitch."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fastgen.metrics.bootstrap import bootstrap_interval
from fastgen.metrics.summary import Metric

MIN_PITCH, MAX_PITCH = 80.0, 1000.0
"""Range of candidate pitches in Hz."""
SHORTEST = 0.25
"""Minimum duration of a sound in seconds; in shorter sounds, the harmonics of a pitch are not resolved."""
STEP = 5e-4  # relative difference of candidate pitches
NAME, NOTE = "energy at harmonics", "of the best-fitting pitch"
ROUNDING = 1e-12  # relative rounding error of a constant signal minus its mean
WIDTH = 4.0  # half width of a harmonic in Hz, or in bins if these are wider; a sine in a Hann window takes two bins


def evaluate_sounds(
    real: Tensor, generated: Tensor, rate: int, *, resamples: int = 1000, seed: int = 0
) -> list[Metric]:
    """Mean ``harmonicity`` of generated sounds, and of held-out sounds for comparison.

    Args:
        real: held-out sounds (N, samples) of at least ``SHORTEST`` seconds.
        generated: generated sounds (M, samples) of at least ``SHORTEST`` seconds.
        rate: sample rate in Hz.
        resamples: number of bootstrap resamples; 0 omits the intervals. There is no interval for a single sound.
        seed: random seed of the resampling.

    Returns:
        Two metrics, of generated and of held-out sounds.

    Raises:
        ValueError: see ``harmonicity``.
    """
    metrics = []
    for name, title, waves in (("generated", NAME, generated), ("held-out", f"{NAME}, held-out sounds", real)):
        try:
            shares = harmonicity(waves, rate)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from error
        metric = Metric(title, shares.mean().item(), n={name: len(shares)}, note=NOTE)
        if resamples and len(shares) > 1:
            interval = bootstrap_interval(shares, resamples=resamples, seed=seed)
            metric = replace(metric, low=interval.low, high=interval.high)
        metrics.append(metric)
    return metrics


def harmonicity(waves: Tensor, rate: int) -> Tensor:
    """Fraction of the energy of each sound at the harmonics of its best-fitting pitch.

    The spectrum is computed with a Hann window over the whole sound. A harmonic includes 4 Hz to either side, or
    4 / seconds for sounds shorter than a second. The result is 1 for a sustained tone, whatever the strengths of its
    harmonics; about 0.12 for a second of white noise and 0.46 for a quarter of a second; and 0 for silence.

    Args:
        waves: sounds (N, samples), on any device.
        rate: sample rate in Hz.

    Returns:
        Fractions (N,) in [0, 1], float64 on the CPU.

    Raises:
        ValueError: if waves are not (N, samples), are shorter than ``SHORTEST`` seconds, or are NaN or infinite.

    Example:
        >>> time = torch.arange(8000) / 8000
        >>> round(float(harmonicity(torch.sin(2 * math.pi * 220 * time)[None], 8000)), 3)
        1.0
    """
    if waves.dim() != 2 or not waves.numel():
        raise ValueError(f"waves: expected (N, samples), got {tuple(waves.shape)}")
    length = waves.size(1)
    if length < SHORTEST * rate:
        raise ValueError(f"waves: expected at least {SHORTEST:g} s, got {length / rate:g} s")
    waves = waves.detach().cpu().double()
    if not bool(waves.isfinite().all()):
        raise ValueError("waves: expected finite numbers")
    largest = waves.abs().amax(1, keepdim=True)
    waves = waves - waves.mean(1, keepdim=True)
    peak = waves.abs().amax(1, keepdim=True)
    waves = torch.where(peak > ROUNDING * largest, waves / peak, 0.0)  # constant signals become silence
    power = torch.fft.rfft(waves * torch.hann_window(length, periodic=False, dtype=torch.float64)).abs().square()
    cumulative = torch.nn.functional.pad(power.cumsum(1), (1, 0))  # energy of the bins below each bin
    count = int(math.log(MAX_PITCH / MIN_PITCH) / STEP) + 1
    pitches = MIN_PITCH * torch.exp(STEP * torch.arange(count, dtype=torch.float64)) * length / rate  # in bins
    width = WIDTH * max(1.0, length / rate)
    energy = torch.zeros(len(waves), count, dtype=torch.float64)
    harmonic, last = 1, power.size(1)
    while pitches[0] * harmonic - width < last:
        center = pitches * harmonic
        low, high = (center - width).ceil().long(), (center + width).floor().long() + 1
        energy += cumulative[:, high.clamp(max=last)] - cumulative[:, low.clamp(max=last)]
        harmonic += 1
    return energy.amax(1) / cumulative[:, -1].clamp(min=1e-12)
