"""Harmonicity: the share of a sound's energy at the harmonics of its pitch."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from fastgen.metrics import evaluate_sounds, harmonicity

RATE = 8000
TIME = torch.arange(RATE, dtype=torch.float64) / RATE


def partials(*frequencies: float) -> Tensor:
    return torch.stack([(2 * math.pi * each * TIME + i).sin() for i, each in enumerate(frequencies)]).sum(0)


def noise(n: int) -> Tensor:
    return torch.randn(n, RATE, generator=torch.Generator().manual_seed(0))


def test_harmonics_of_one_pitch_have_all_the_energy() -> None:
    for pitch in (83.0, 110.0, 311.13, 950.0):
        tone = partials(*(pitch * k for k in range(1, 9) if pitch * k < RATE / 2))
        decaying = tone * torch.exp(-TIME / 0.3)
        assert (harmonicity(torch.stack((tone, 1e-3 * tone + 5, decaying, tone.flip(0))), RATE) > 0.999).all()
        assert harmonicity(tone[None, : RATE // 4], RATE) > 0.999


def test_partials_that_share_no_pitch_have_the_strongest_one_s_share() -> None:
    apart = partials(310.0, 437.0, 563.0, 1111.0)
    assert 0.2 < harmonicity(apart[None], RATE) < 0.55
    assert (harmonicity(noise(4), RATE) < 0.2).all()
    assert harmonicity(torch.zeros(1, RATE), RATE) == 0
    assert harmonicity(torch.full((1, RATE), 0.1, dtype=torch.float64), RATE) == 0
    quiet = 1e-9 * noise(1)
    torch.testing.assert_close(harmonicity(quiet, RATE), harmonicity(1e9 * quiet, RATE), rtol=1e-4, atol=0)


def test_energy_between_the_harmonics_counts_against_a_tone() -> None:
    tone, other = partials(200.0, 400.0, 600.0, 800.0), noise(1)[0]
    other *= tone.norm() / other.norm()
    shares = harmonicity(torch.stack([tone + part * other for part in (0.0, 0.3, 1.0, 3.0)]), RATE)
    chance = 9 / 100  # 4 bins to either side of every multiple; an octave below fits the tone as well
    wanted = [(1 + part**2 * chance) / (1 + part**2) for part in (0.0, 0.3, 1.0, 3.0)]
    torch.testing.assert_close(shares, torch.tensor(wanted).double(), rtol=0, atol=0.03)


REFUSED = {
    "one wave": (torch.zeros(8000), "waves: expected (N, samples), got (8000,)"),
    "none": (torch.zeros(0, 8000), "waves: expected (N, samples), got (0, 8000)"),
    "too short": (torch.zeros(1, 800), "waves: expected at least 0.25 s, got 0.1 s"),
    "not a number": (torch.full((1, 8000), math.nan), "waves: expected finite numbers"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_waves_of_another_shape_or_too_short_are_rejected(what: str) -> None:
    waves, error = REFUSED[what]
    with pytest.raises(ValueError, match=f"^{re.escape(error)}$"):
        harmonicity(waves, RATE)
    with pytest.raises(ValueError, match=f"^generated {re.escape(error)}$"):
        evaluate_sounds(noise(2), waves, RATE)


def test_generated_sounds_are_reported_before_held_out_ones() -> None:
    tones = torch.stack([partials(110.0, 220.0), partials(150.0)])
    found, held = evaluate_sounds(tones, noise(3), RATE, resamples=50)
    assert (found.n, held.n) == ({"generated": 3}, {"held-out": 2})
    assert found.low is not None
    assert found.low <= found.value < 0.2 < 0.99 < held.value
    assert evaluate_sounds(tones, noise(1), RATE)[0].low is None
    assert str(held).startswith("energy at harmonics, held-out sounds  1.0")
