"""Audio: tones, and a user's WAV files, in pieces of one length."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgen.data._base import Dataset, Items, TensorItems, digest
from fastgen.data.splitting import HELD_OUT, at_least, hold_out, hold_out_groups

TONES, TONE_RATE = 1000, 8000
FORMATS = {3: "floats", 6: "A-law", 7: "mu-law", 65534: "the extensible format"}


def audio_dataset(name: str, waves: Tensor, rate: int, train: Tensor, held: Tensor, scale: float | None) -> Dataset:
    """Kind audio: waves (N, length), divided by ``scale`` where they are integers."""
    scales = {} if scale is None else {"audio": scale}
    facts = {"sample_rate": rate, "length": waves.shape[1]}

    def make_splits() -> tuple[Items, Items]:
        return TensorItems({"audio": waves[train]}, scales), TensorItems({"audio": waves[held]}, scales)

    return Dataset(name, "audio", facts, digest("audio", facts, scale, waves, held), make_splits)


def tones(items: int, every: int, seconds: float) -> Dataset:
    """Plucked and blown tones of 24 pitches from 110 Hz up, a semitone apart, 8000 samples a second.

    Each is a sum of up to eight harmonics below 4000 Hz, of random strengths and phases, that rises within 5 to 50 ms
    and dies away within 0.1 to 1 s. The loudest sample is 0.4 to 0.9; 16 bits.
    """
    n, length = items or TONES, _samples(seconds, TONE_RATE)
    at_least("tones", n)
    generator = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    pitch = 110 * 2 ** (torch.randint(0, 24, (n, 1), generator=generator).double() / 12)
    rise, fall, loudness = uniform(0.005, 0.05, n, 1), uniform(0.1, 1.0, n, 1), uniform(0.4, 0.9, n, 1)
    harmonic = torch.arange(1, 9)
    strength = uniform(0.3, 0.9, n, 1) ** (harmonic - 1) * uniform(0.3, 1.0, n, 8)
    strength = torch.where(pitch * harmonic < TONE_RATE / 2, strength, 0.0)
    phasors = torch.polar(strength, 2 * math.pi * uniform(0, 1, n, 8))
    time = torch.arange(length, dtype=torch.float64) / TONE_RATE
    waves = torch.empty(n, length, dtype=torch.int16)
    for part in torch.arange(n).split(64):
        turn = torch.polar(torch.ones(()).double(), 2 * math.pi * pitch[part] * time)
        total = torch.zeros_like(turn)
        for k in reversed(range(8)):  # sum over k of phasor_k turn^k, by Horner's rule
            total = (total + phasors[part, k, None]) * turn
        sound = total.imag * (time / rise[part]).clamp(max=1) * torch.exp(-time / fall[part])
        sound *= loudness[part] / sound.abs().amax(1, keepdim=True).clamp(min=1e-6)
        waves[part] = (sound * 32767).round().short()  # coarser than what machines' sines differ by
    return audio_dataset("tones", waves, TONE_RATE, *hold_out(n, every), scale=32767.0)


def read_wavs(name: str, paths: list[Path], seconds: float, every: int) -> Dataset:
    """Recordings, cut into pieces of ``seconds`` one after the other, channels averaged.

    What is left at the end of a recording is dropped; one shorter than a piece is filled up with silence. Of at
    least 2 ``every`` recordings whole ones are held out; of fewer, the last pieces of each.

    Raises:
        ValueError: not PCM, truncated, different sample rates, too few pieces. Names the file.
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


def read_wav(path: Path) -> tuple[Tensor, int]:
    """((samples,) float32 in [-1, 1], samples a second) of PCM with 8, 16, 24 or 32 bits, channels averaged."""
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate, n = file.getsampwidth(), file.getnchannels(), file.getframerate(), file.getnframes()
            data = file.readframes(n)
    except (wave.Error, EOFError, OSError) as error:
        got = str(error) or "a truncated one"
        number = got.rpartition(" ")[2]
        if got.startswith("unknown format") and number.isdecimal():
            got = FORMATS.get(int(number), f"format {number}")
        raise ValueError(f"{path}: expected a WAV file of PCM (8, 16, 24 or 32 bits), got {got}") from error
    if width not in (1, 2, 3, 4):
        raise ValueError(f"{path}: expected PCM of 8, 16, 24 or 32 bits, got {8 * width}")
    if len(data) != n * width * channels or not n:
        raise ValueError(f"{path}: expected {n or 'some'} samples, got {len(data) // (width * channels)}: truncated?")
    raw = np.frombuffer(data, np.uint8).reshape(-1, width)
    if width == 1:
        values = raw[:, 0].astype(np.float32) - 128
    else:
        wide = np.zeros((len(raw), 4), np.uint8)
        wide[:, 4 - width :] = raw  # the sample's bytes on top of a 32-bit number
        values = (wide.view("<i4")[:, 0] >> (32 - 8 * width)).astype(np.float64)
    mono = values.reshape(-1, channels).mean(1, dtype=np.float64) / 2 ** (8 * width - 1)
    return torch.from_numpy(mono.astype(np.float32)), rate


def _samples(seconds: float, rate: int) -> int:
    length = round(seconds * rate)
    if length < 1:
        raise ValueError(f"seconds: expected at least one sample ({1 / rate:g} s), got {seconds}")
    return length
