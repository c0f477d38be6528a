"""Audio: bundled tones, and a user's WAV and FLAC files, in pieces of one length."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgen.data._base import Dataset, Source, TensorItems, digest
from fastgen.data._files import broken_files, few, read_bytes
from fastgen.data._optional import need
from fastgen.data.config import RATES, DataConfig
from fastgen.data.splitting import HELD_OUT, at_least, hold_out, hold_out_groups
from fastgen.data.wav import read_wav

SOUND_SUFFIXES = frozenset((".wav", ".flac"))
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
INSTRUMENT_NAMES = ("string", "bright-string", "flute", "reed")
NOTES = ("A", "A#", "B", "C", "C#", "D", "D#", "E", "F", "F#", "G", "G#")
PITCHES = 24


def audio_dataset(
    name: str,
    waves: Tensor,
    rate: int,
    train: Tensor,
    held: Tensor,
    scale: float | None,
    labels: Tensor | None = None,
    class_names: Sequence[str] = (),
) -> Dataset:
    """Kind audio: waves (N, length), divided by ``scale`` where they are integers; labels (N,) int64."""
    scales = {} if scale is None else {"audio": scale}
    facts = {"sample_rate": rate, "length": waves.shape[1]}
    tensors = {"audio": waves} if labels is None else {"audio": waves, "labels": labels}
    counts = [] if labels is None else labels.bincount(minlength=len(class_names)).tolist()

    train_items, held_out = (
        TensorItems({key: tensor[part] for key, tensor in tensors.items()}, scales) for part in (train, held)
    )
    return Dataset(
        name,
        "audio",
        {**facts, "classes": len(counts)},
        digest("audio", facts, scale, waves, held, *([] if labels is None else [labels])),
        train_items,
        held_out,
        dict(zip(class_names, counts, strict=True)),
    )


def tones(items: int, every: int, seconds: float) -> Dataset:
    """Tones of four instruments and 24 pitches from 110 Hz up, a semitone apart, 8000 samples a second.

    Labels are those of the instrument and the pitch: ``string-A2``, ``string-A#2``, ..., ``reed-G#4``.

    A tone is the sum of up to eight harmonics, those below 4000 Hz. ``INSTRUMENTS`` gives their strengths and phases,
    so that there are timbres to learn; each strength varies by a tenth, and the sound begins anywhere in the period.
    Strings rise within 5 to 20 ms and decay within 0.2 to 0.6 s, pipes rise within 20 to 50 ms and decay within 0.6 to
    2 s. The loudest sample is 0.4 to 0.9; 16 bits.
    """
    n, length = items or TONES, _samples(seconds, TONE_RATE)
    at_least("tones", n)
    generator = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    def within(ranges: list[tuple[float, float]]) -> Tensor:
        low, high = torch.tensor(ranges, dtype=torch.float64)[instrument].split(1, 1)
        return torch.lerp(low, high, uniform(0, 1, n, 1))

    semitone, instrument = (torch.randint(0, many, (n,), generator=generator) for many in (PITCHES, len(INSTRUMENTS)))
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
    for pitch in range(PITCHES):
        part = (semitone == pitch).nonzero()[:, 0]
        frequency = 2 * math.pi * 110 * 2 ** (pitch / 12) * harmonic  # radians per second
        frequency = frequency[frequency < math.pi * TONE_RATE]
        angle, audible = frequency[:, None] * time, len(frequency)
        sines, cosines = strength[part] * phase[part].cos(), strength[part] * phase[part].sin()
        sound = sines[:, :audible] @ angle.sin() + cosines[:, :audible] @ angle.cos()
        decay = fall[part, :, None]  # of blocks, and within one: fewer exponentials
        sound *= (torch.exp(-start / decay) * torch.exp(-step / decay)).flatten(1)[:, :length]
        risen = round(0.05 * TONE_RATE)
        sound[:, :risen] *= (time[:risen] / rise[part]).clamp(max=1)
        sound *= 32767 * loudness[part] / sound.abs().amax(1, keepdim=True).clamp(min=1e-6)
        waves[part] = sound.round_().short()  # coarser than what machines' sines differ by
    names = [f"{name}-{note(pitch)}" for name in INSTRUMENT_NAMES for pitch in range(PITCHES)]
    labels = instrument * PITCHES + semitone
    return audio_dataset("tones", waves, TONE_RATE, *hold_out(n, every), 32767.0, labels, names)


def note(semitone: int) -> str:
    """Name of a pitch, in semitones above 110 Hz, A2; octaves begin at C."""
    return f"{NOTES[semitone % 12]}{2 + (semitone + 9) // 12}"


class Recordings(Source):
    """Recordings, cut into consecutive pieces of ``config.seconds``, channels averaged.

    They are resampled to ``config.sample_rate``, by default the rate that most of them have. The rest at the end of a
    recording is dropped; a recording shorter than a piece is padded with silence. Those of ``test`` are held out, if
    there is one; else of at least 2 ``held_out`` recordings whole ones, and of fewer the last pieces of each.

    Subfolders are classes, in sorted order, where there are two or more.

    Args:
        files: path below the folder of this split -> the file.
    """

    kinds = ("audio",)
    options = frozenset(("seconds", "sample_rate", "skip_broken", "test_data"))

    def __init__(self, config: DataConfig, files: Mapping[Path, Path]) -> None:
        self.config, self.files = config, files
        self.test: Recordings | None = None

    def load(self, kind: str) -> Dataset:
        """Raises ValueError for files that are neither PCM nor floats nor FLAC, or truncated, all of them in one
        message; recordings both directly in a folder and in subfolders; held-out ones of other classes."""
        name, seconds, every = self.config.source, self.config.seconds, self.config.held_out
        if self.test and every:
            raise ValueError(
                f"{name}: held_out: expected 0, as the data have a held-out split of their own, got {every}"
            )
        classes = self._classes()
        names = classes if len(classes) > 1 else []
        sounds, numbers, notes = self._read(names)
        trained_on = len(sounds)
        if self.test:
            more_sounds, more_numbers, more_notes = self.test._read(names)
            sounds, numbers, notes = sounds + more_sounds, numbers + more_numbers, notes + more_notes
        rates = Counter(rate for _, rate in sounds)
        rate = self.config.sample_rate or max(rates, key=lambda each: (rates[each], -each))
        length = _samples(seconds, rate)
        pieces, owners = [], []
        for number, (samples, own) in enumerate(sounds):
            if own != rate:
                samples = resample(samples, own, rate)
            if len(samples) < length:
                samples = torch.cat([samples, samples.new_zeros(length - len(samples))])
            cut = samples[: len(samples) // length * length].view(-1, length)
            pieces.append(cut)
            owners += [number] * len(cut)
        waves, groups = torch.cat(pieces), torch.tensor(owners)
        at_least(name, len(waves), f"pieces of {seconds:g} s (--seconds)")
        own_labels = torch.tensor(numbers) if names else None
        if self.test:
            is_held = groups >= trained_on
            train, held = ((~is_held).nonzero()[:, 0], is_held.nonzero()[:, 0])
        else:
            train, held = _split_recordings(groups, len(sounds), every, own_labels)
        labels = None if own_labels is None else own_labels[groups]
        if others := ", ".join(f"{n:,} of {own}" for own, n in sorted(rates.items()) if own != rate):
            notes.append(f"recordings resampled to {rate} samples a second: {others}")
        data = audio_dataset(name, waves, rate, train, held, scale=None, labels=labels, class_names=names)
        return dataclasses.replace(data, warnings=tuple(notes))

    def _classes(self) -> list[str]:
        """Names of the subfolders; [] where the recordings are directly inside."""
        classes = sorted({file.parts[0] for file in self.files if len(file.parts) > 1})
        direct = next((file for file in self.files if len(file.parts) == 1), None)
        if direct and classes:
            raise ValueError(
                f"{self.config.source}: expected recordings directly inside or in subfolders, one for each class, "
                f"got both ({direct} and {classes[0]}{os.sep})"
            )
        return classes

    def _read(self, classes: Sequence[str]) -> tuple[list[tuple[Tensor, int]], list[int], list[str]]:
        """((samples, samples a second), number of the class) of each recording that can be read, and notes."""
        name, own = self.config.source, self._classes()
        if classes and not own:
            raise ValueError(f"{name}: expected a subfolder for each class, as for training, got none")
        if classes and (unknown := sorted({*own} - {*classes})):
            raise ValueError(f"{name}: expected classes of the training data ({few(classes)}), got {few(unknown)}")
        number = {each: i for i, each in enumerate(classes)}
        sounds, numbers, broken = [], [], {}
        paths = list(self.files.values())
        for i, (below, path) in enumerate(self.files.items()):
            try:
                samples, rate = read_sound(path)
                if not RATES[0] <= rate <= RATES[1]:
                    raise ValueError(f"{path}: expected a sample rate from {RATES[0]} to {RATES[1]}, got {rate}")
            except ValueError as error:
                broken[i] = str(error)
                continue
            sounds.append((samples, rate))
            numbers.append(number.get(below.parts[0], 0))
        notes = broken_files(
            name, "recordings", lambda i: str(paths[i]), len(paths), broken, skip=self.config.skip_broken
        )
        if not sounds:
            raise ValueError(f"{name}: expected recordings, got {len(paths)} files of which none can be read")
        return sounds, numbers, [*notes]


ZEROS, ROLLOFF, KAISER_BETA = 32, 0.95, 9.0
"""Anti-aliasing filter: zero crossings on each side, cutoff as a share of the lower Nyquist frequency, window."""


def resample(samples: Tensor, rate: int, new_rate: int) -> Tensor:
    """(samples,) float32 in [-1, 1] at another rate: scipy's polyphase filter, a sinc with a Kaiser window.

    scipy is in the ``train`` extra already, and its filter takes any ratio of rates. What the filter's overshoot takes
    beyond [-1, 1] is clamped.
    """
    signal = need("scipy.signal", "scipy", "sample_rate")
    common = math.gcd(rate, new_rate)
    up, down = new_rate // common, rate // common
    half = ZEROS * max(up, down)
    taps = signal.firwin(2 * half + 1, ROLLOFF / max(up, down), window=("kaiser", KAISER_BETA))
    wave = signal.resample_poly(samples.numpy().astype(np.float64), up, down, window=taps)
    return torch.from_numpy(wave.clip(-1, 1).astype(np.float32))


def read_sound(path: Path) -> tuple[Tensor, int]:
    """((samples,) float32 in [-1, 1], samples a second) of a WAV or FLAC file, channels averaged.

    Raises:
        ValueError: another format, or a damaged file. ImportError: FLAC without soundfile. OSError: it can't be read.
    """
    if path.suffix.lower() != ".flac":
        return read_wav(path)
    library = need("soundfile", "soundfile", str(path), extra="audio")
    data = read_bytes(path)
    try:
        frames, rate = library.read(io.BytesIO(data), dtype="float64", always_2d=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a FLAC file, got one that can't be decoded: {error}") from error
    if not len(frames):
        raise ValueError(f"{path}: expected a FLAC file with samples, got none")
    return torch.from_numpy(frames.mean(1).astype(np.float32)), int(rate)


def _split_recordings(groups: Tensor, recordings: int, every: int, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """(training, held out) pieces; groups: (N,) the recording of each piece; labels: (recordings,) their classes."""
    if recordings >= 2 * (every or HELD_OUT):
        return hold_out_groups(groups, every, labels)
    held = torch.zeros(len(groups), dtype=torch.bool)
    for recording in range(recordings):
        own = (groups == recording).nonzero()[:, 0]
        held[own[len(own) - len(own) // (every or HELD_OUT) :]] = True
    if not held.any():
        held[-1] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def _samples(seconds: float, rate: int) -> int:
    length = round(seconds * rate)
    if length < 1:
        raise ValueError(f"seconds: expected at least one sample ({1 / rate:g} s), got {seconds}")
    return length
