"""Audio: tones, and a user's WAV files, in pieces of one length."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.data._base import Dataset, Items, TensorItems, digest
from fastgen.data.splitting import HELD_OUT, at_least, hold_out, hold_out_groups
from fastgen.data.wav import read_wav

TONES, TONE_RATE = 4000, 8000
BLOCK = 80  # samples


class Instrument(NamedTuple):
    """Strengths and phases (in periods) of eight harmonics; seconds in which a tone rises, and falls to 1/e of it."""

    strengths: tuple[float, ...]
    phases: tuple[float, ...]
    rise: tuple[float, float]
    fall: tuple[float, float]


STRING, PIPE = ((0.005, 0.02), (0.2, 0.6)), ((0.02, 0.05), (0.6, 2.0))
INSTRUMENTS = (
    Instrument((1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08), (0.0,) * 8, *STRING),
    Instrument((0.6, 1.0, 0.3, 0.5, 0.1, 0.2, 0.05, 0.1), (0.0, 0.3, 0.6, 0.1, 0.8, 0.4, 0.2, 0.7), *STRING),
    Instrument((1.0, 0.3, 0.1, 0.03, 0.01, 0.0, 0.0, 0.0), (0.0, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), *PIPE),
    Instrument((1.0, 0.05, 0.6, 0.05, 0.4, 0.05, 0.2, 0.05), (0.0, 0.2, 0.5, 0.4, 0.0, 0.1, 0.5, 0.3), *PIPE),
)
"""Two strings, of which the second has strong even harmonics, a flute, and a reed whose harmonics are odd."""


def audio_dataset(name: str, waves: Tensor, rate: int, train: Tensor, held: Tensor, scale: float | None) -> Dataset:
    """Kind audio: waves (N, length), divided by ``scale`` where they are integers."""
    scales = {} if scale is None else {"audio": scale}
    facts = {"sample_rate": rate, "length": waves.shape[1]}

    def make_splits() -> tuple[Items, Items]:
        return TensorItems({"audio": waves[train]}, scales), TensorItems({"audio": waves[held]}, scales)

    return Dataset(name, "audio", facts, digest("audio", facts, scale, waves, held), make_splits)


def tones(items: int, every: int, seconds: float) -> Dataset:
    """Tones of four instruments and 24 pitches from 110 Hz up, a semitone apart, 8000 samples a second.

    A tone is the sum of those of eight harmonics that lie below 4000 Hz. Strengths and phases are the instrument's
    (``INSTRUMENTS``), so that there are timbres to learn; each strength varies by a tenth, and the sound begins
    anywhere in the period. Strings rise within 5 to 20 ms and die away within 0.2 to 0.6 s, pipes rise within 20 to
    50 ms and die away within 0.6 to 2 s. The loudest sample is 0.4 to 0.9; 16 bits.
    """
    n, length = items or TONES, _samples(seconds, TONE_RATE)
    at_least("tones", n)
    generator = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    def within(ranges: list[tuple[float, float]]) -> Tensor:
        low, high = torch.tensor(ranges, dtype=torch.float64)[instrument].split(1, 1)
        return torch.lerp(low, high, uniform(0, 1, n, 1))

    semitone, instrument = (torch.randint(0, many, (n,), generator=generator) for many in (24, len(INSTRUMENTS)))
    rise, fall = within([found.rise for found in INSTRUMENTS]), within([found.fall for found in INSTRUMENTS])
    loudness, harmonic = uniform(0.4, 0.9, n, 1), torch.arange(1, 9)
    strength = torch.tensor([found.strengths for found in INSTRUMENTS], dtype=torch.float64)[instrument]
    phase = torch.tensor([found.phases for found in INSTRUMENTS], dtype=torch.float64)[instrument]
    phase = 2 * math.pi * (phase + harmonic * uniform(0, 1, n, 1))
    strength = strength * uniform(0.9, 1.1, n, 8)

    start = torch.arange(0, length, BLOCK, dtype=torch.float64)[:, None] / TONE_RATE
    step = torch.arange(BLOCK, dtype=torch.float64) / TONE_RATE
    time = (start + step).flatten()[:length]
    waves = torch.empty(n, length, dtype=torch.int16)
    for pitch in range(24):
        part = (semitone == pitch).nonzero()[:, 0]
        turn = 2 * math.pi * 110 * 2 ** (pitch / 12) * harmonic
        turn = turn[turn < math.pi * TONE_RATE]
        angle, audible = turn[:, None] * time, len(turn)
        sines, cosines = (strength[part] * of(phase[part]) for of in (torch.cos, torch.sin))
        sound = sines[:, :audible] @ angle.sin() + cosines[:, :audible] @ angle.cos()
        decay = fall[part, :, None]  # of blocks, and within one: fewer exponentials
        sound *= (torch.exp(-start / decay) * torch.exp(-step / decay)).flatten(1)[:, :length]
        risen = round(0.05 * TONE_RATE)
        sound[:, :risen] *= (time[:risen] / rise[part]).clamp(max=1)
        sound *= 32767 * loudness[part] / sound.abs().amax(1, keepdim=True).clamp(min=1e-6)
        waves[part] = sound.round_().short()  # coarser than what machines' sines differ by
    return audio_dataset("tones", waves, TONE_RATE, *hold_out(n, every), scale=32767.0)


def read_wavs(name: str, paths: list[Path], seconds: float, every: int) -> Dataset:
    """Recordings, cut into pieces of ``seconds`` one after the other, channels averaged.

    What is left at the end of a recording is dropped; one shorter than a piece is filled up with silence. Of at
    least 2 ``every`` recordings whole ones are held out; of fewer, the last pieces of each.

    Raises:
        ValueError: neither PCM nor floats, truncated, different sample rates, too few pieces. Names the file.
    """
    pieces, owners, rates = [], [], []
    for path in paths:
        samples, rate = read_wav(path)
        rates.append(rate)
        if rate != rates[0]:
            raise ValueError(f"{path}: expected {rates[0]} samples a second, as in {paths[0]}, got {rate}")
        length = _samples(seconds, rate)
        if len(samples) < length:
            samples = torch.cat([samples, samples.new_zeros(length - len(samples))])
        cut = samples[: len(samples) // length * length].view(-1, length)
        pieces.append(cut)
        owners += [len(rates) - 1] * len(cut)
    waves, groups = torch.cat(pieces), torch.tensor(owners)
    at_least(name, len(waves), f"pieces of {seconds:g} s (--seconds)")
    if len(paths) >= 2 * (every or HELD_OUT):
        train, held = hold_out_groups(groups, every)
    else:
        held_mask = torch.zeros(len(waves), dtype=torch.bool)
        for owner in range(len(paths)):
            own = (groups == owner).nonzero()[:, 0]
            held_mask[own[len(own) - len(own) // (every or HELD_OUT) :]] = True
        if not held_mask.any():
            held_mask[-1] = True
        train, held = (~held_mask).nonzero()[:, 0], held_mask.nonzero()[:, 0]
    return audio_dataset(name, waves, rates[0], train, held, scale=None)


def _samples(seconds: float, rate: int) -> int:
    length = round(seconds * rate)
    if length < 1:
        raise ValueError(f"seconds: expected at least one sample ({1 / rate:g} s), got {seconds}")
    return length
