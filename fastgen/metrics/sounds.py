"""Whether a sound has a pitch: how much of its energy lies at the multiples of one frequency."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fastgen.metrics.bootstrap import bootstrap_interval
from fastgen.metrics.figures import Figure

LOWEST, HIGHEST = 80.0, 1000.0
"""Pitches that are tried, in Hz."""
SHORTEST = 0.25
"""Seconds that a sound must last, or else the multiples of a pitch are not apart."""
STEP = 5e-4  # between pitches that are tried, as a share of one
NAME, NOTE = "energy at harmonics", "of the best-fitting pitch"
ROUNDING = 1e-12  # of a constant, less its mean
WIDTH = 4.0  # Hz to either side of a multiple, or bins where they are wider; a sine in a Hann window takes two


def evaluate_sounds(
    real: Tensor, generated: Tensor, rate: int, *, resamples: int = 1000, seed: int = 0
) -> list[Figure]:
    """The mean ``harmonicity`` of generated sounds, and of held-out ones, as the best that can be hoped for.

    Args:
        real, generated: (N, samples), of any two lengths from ``SHORTEST`` seconds on.
        rate: samples a second, of both.
        resamples, seed: of the intervals; none for 0 resamples or a single sound.

    Raises:
        ValueError: as ``harmonicity``; says which, generated or held-out.
    """
    figures = []
    for name, title, waves in (("generated", NAME, generated), ("held-out", f"{NAME}, held-out sounds", real)):
        try:
            shares = harmonicity(waves, rate)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from error
        figure = Figure(title, shares.mean().item(), n={name: len(shares)}, note=NOTE)
        if resamples and len(shares) > 1:
            found = bootstrap_interval(shares, resamples=resamples, seed=seed)
            figure = replace(figure, low=found.low, high=found.high)
        figures.append(figure)
    return figures


def harmonicity(waves: Tensor, rate: int) -> Tensor:
    """The share of each sound's energy that lies at the multiples of its best-fitting pitch.

    Of a Hann window over the whole sound; a multiple takes 4 Hz to either side, in less than a second 4 / seconds. A
    held tone has 1, whatever its harmonics' strengths; white noise about 0.12 in a second, 0.46 in a quarter; silence
    0.

    Args:
        waves: (N, samples), on any device.
        rate: samples a second.

    Returns:
        (N,) float64 on the CPU, from 0 to 1.

    Raises:
        ValueError: waves of another shape, shorter than ``SHORTEST`` seconds, NaN or infinite.
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
    waves = torch.where(peak > ROUNDING * largest, waves / peak, 0.0)  # quiet sounds have a pitch, constants have none
    power = torch.fft.rfft(waves * torch.hann_window(length, periodic=False, dtype=torch.float64)).abs().square()
    upto = torch.nn.functional.pad(power.cumsum(1), (1, 0))  # of the bins before each
    count = int(math.log(HIGHEST / LOWEST) / STEP) + 1
    pitches = LOWEST * torch.exp(STEP * torch.arange(count, dtype=torch.float64)) * length / rate  # in bins
    width = WIDTH * max(1.0, length / rate)
    found = torch.zeros(len(waves), count, dtype=torch.float64)
    multiple, last = 1, power.size(1)
    while pitches[0] * multiple - width < last:
        place = pitches * multiple
        low, high = (place - width).ceil().long(), (place + width).floor().long() + 1
        found += upto[:, high.clamp(max=last)] - upto[:, low.clamp(max=last)]
        multiple += 1
    return found.amax(1) / upto[:, -1].clamp(min=1e-12)
