"""Bundled datasets: tensors of their batches, held-out splits, options that are rejected, descriptions."""

from __future__ import annotations

import doctest
import re
from collections import Counter
from typing import Any

import pytest
import torch

from fastgen.batch import detokenize, tokenize
from fastgen.batch import vocabulary as _vocabulary
from fastgen.data import SOURCES, DataConfig, Dataset, Items, describe, load_data
from fastgen.data.text import prose
from fastgen.metrics import harmonicity

SERVED = [
    ("digits", "images", {"image_size": 8, "channels": 1, "levels": 17, "classes": 10}),
    ("textures", "domains", {"image_size": 32, "channels": 1, "levels": 256}),
    ("textures", "images", {"image_size": 32, "channels": 1, "levels": 256, "classes": 2}),
    ("photos", "images", {"image_size": 32, "channels": 3, "levels": 256, "classes": 0}),
    ("photos", "pairs", {"image_size": 32, "input_channels": 1, "channels": 3, "levels": 256}),
    ("prose", "text", {}),
    ("reversal", "sequences", {"source_length": 14, "target_length": 14}),
    ("sums", "sequences", {"vocabulary": "+0123456789", "source_length": 9, "target_length": 6}),
    ("tones", "audio", {"sample_rate": 8000, "length": 8000, "classes": 96}),
]
SMALL = {source: {"items": 60} for source in ("textures", "photos", "reversal", "sums", "tones")}


def everything(items: Items) -> dict[str, torch.Tensor]:
    return items.batch(torch.arange(len(items)))


def check_contract(data: Dataset) -> None:
    """Batches hold what ``fastgen.batch.KINDS`` says of the kind."""
    facts: dict[str, Any] = dict(data.facts)
    for items in data.splits(length=33) if data.kind == "text" else data.splits():
        batch = items.batch(torch.tensor([len(items) - 1, 0, 0]))
        if data.kind == "text":
            assert batch["tokens"].shape == (3, 33)
            limits = {"tokens": len(facts["vocabulary"])}
        elif data.kind == "sequences":
            assert batch["source"].shape == (3, facts["source_length"])
            assert batch["target"].shape == (3, facts["target_length"])
            limits = dict.fromkeys(batch, len(facts["vocabulary"]) + 3)
        else:
            limits = {"labels": facts["classes"]} if facts.get("classes") else {}
            if facts.get("caption_length"):
                limits["caption"] = 1 + len(facts["caption_vocabulary"])
                assert batch["caption"].shape == (3, facts["caption_length"])
            low = -1 if data.kind == "audio" else 0
            names = {"images": ["images"], "pairs": ["inputs", "targets"], "domains": ["a", "b"], "audio": ["audio"]}
            assert set(batch) == {*names[data.kind], *limits}
            for name in names[data.kind]:
                channels = facts.get("input_channels" if name == "inputs" else "channels")
                side = facts.get("image_size")
                shape = (facts["length"],) if data.kind == "audio" else (channels, side, side)
                assert batch[name].shape == (3, *shape)
                assert batch[name].dtype == torch.float32
                assert low <= batch[name].min()
                assert batch[name].max() <= 1
                if "levels" in facts:
                    steps = batch[name] * (facts["levels"] - 1)
                    assert (steps - steps.round()).abs().max() < 1e-4
        for name, limit in limits.items():
            assert batch[name].dtype == torch.int64
            assert batch[name].min() >= 0
            assert batch[name].max() < limit
        assert all(torch.equal(part[1], part[2]) for part in batch.values())


@pytest.mark.parametrize(("source", "kind", "facts"), SERVED, ids=[f"{s}-{k}" for s, k, _ in SERVED])
def test_bundled_datasets_follow_the_contract_of_their_kind_and_are_deterministic(
    source: str, kind: str, facts: dict[str, Any]
) -> None:
    config = DataConfig(source=source, **SMALL.get(source, {}))
    data, again = load_data(config, kind), load_data(config, kind)
    assert data.kind == kind
    assert facts.items() <= data.facts.items()
    check_contract(data)
    assert data.fingerprint == again.fingerprint
    other = load_data(DataConfig(source=source, held_out=3, **SMALL.get(source, {})), kind)
    assert other.fingerprint != data.fingerprint


def test_every_bundled_dataset_is_tested() -> None:
    assert {source for source, _, _ in SERVED} == set(SOURCES)
    for source, line in SOURCES.items():
        kinds = {kind for other, kind, _ in SERVED if other == source}
        assert kinds == {kind for kind in ("images", "pairs", "domains", "text", "sequences", "audio") if kind in line}


def test_digits_are_counts_of_sixteen_split_per_class() -> None:
    from sklearn.datasets import load_digits

    train, held = map(everything, load_data(DataConfig(), "images").splits())
    both = torch.cat([train["images"], held["images"]])
    assert len(both) == 1797
    expected = torch.from_numpy(load_digits().images).float() / 16
    assert torch.equal(both.flatten(1).sum(1).sort().values, expected.flatten(1).sum(1).sort().values)
    counts, kept = held["labels"].bincount(), train["labels"].bincount()
    assert len(counts) == 10
    assert ((counts - (counts + kept) / 5).abs() < 1).all()


def test_the_captions_of_digits_are_their_names() -> None:
    data = load_data(DataConfig(), "images")
    vocabulary, shown = (data.facts[f"caption_{name}"] for name in ("vocabulary", "examples"))
    assert (vocabulary, data.facts["caption_length"]) == ("efghinorstuvwxz", 5)
    assert shown == ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    for items in data.splits():
        batch = everything(items)
        spelt = ["".join(vocabulary[i - 1] for i in row if i) for row in batch["caption"].tolist()]
        assert spelt == [shown[label] for label in batch["labels"]]


def test_resized_digits_have_all_levels() -> None:
    data = load_data(DataConfig(image_size=16), "images")
    assert {"image_size": 16, "channels": 1, "levels": 256, "classes": 10}.items() <= data.facts.items()
    small, large = (everything(load_data(DataConfig(image_size=s), "images").splits()[1])["images"] for s in (8, 16))
    assert (torch.nn.functional.avg_pool2d(large, 2) - small).abs().mean() < 0.05


def test_held_out_patches_share_no_pixel_with_the_others() -> None:
    train, held = load_data(DataConfig(source="textures", items=1000), "images").splits()
    pieces = []
    for part in (train, held):  # all pieces of 8x2 pixels; of grass and gravel no two are alike
        squares = everything(part)["images"].mul(255).byte().unfold(2, 8, 1).unfold(3, 2, 1)
        pieces.append({piece.tobytes() for piece in squares.reshape(-1, 16).numpy()})
    assert not pieces[0] & pieces[1]


def test_grayscale_inputs_are_the_luma_of_their_targets() -> None:
    train, _ = load_data(DataConfig(source="photos", items=60), "pairs").splits()
    batch = everything(train)
    luma = (batch["targets"] * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    assert (batch["inputs"] - luma).abs().max() < 1.5 / 255


def test_held_out_sequences_are_new_and_correct() -> None:
    for source in ("reversal", "sums"):
        data = load_data(DataConfig(source=source, items=5000), "sequences")
        vocabulary = data.facts["vocabulary"]
        train, held = (
            [
                tuple(detokenize(row, vocabulary) for row in pair)
                for pair in zip(*everything(part).values(), strict=True)
            ]
            for part in data.splits()
        )
        assert (len(train), len(held)) == (4000, 1000)
        for text, answer in train + held:
            assert answer == (text[::-1] if source == "reversal" else str(sum(map(int, text.split("+")))))
        keys = [{tuple(sorted(text.split("+"))) for text, _ in part} for part in (train, held)]
        assert not keys[0] & keys[1]


def test_numbers_of_a_sum_have_one_two_or_three_digits() -> None:
    data = load_data(DataConfig(source="sums", items=3000), "sequences")
    texts = [detokenize(row, data.facts["vocabulary"]) for row in everything(data.splits()[0])["source"]]
    lengths = Counter(len(number) for text in texts for number in text.split("+"))
    assert sorted(lengths) == [1, 2, 3]
    assert min(lengths.values()) > 0.15 * lengths.total()
    assert {"0", "9", "10", "99"} <= {number for text in texts for number in text.split("+")}


def test_sequences_are_framed_and_padded_at_the_end() -> None:
    batch = everything(load_data(DataConfig(source="reversal", items=50), "sequences").splits()[0])
    for rows in batch.values():
        assert (rows[:, 0] == 1).all()
        assert (rows == 2).sum(1).eq(1).all()
        padding = rows == 0
        assert torch.equal(padding.sum(1), rows.shape[1] - 1 - rows.eq(2).int().argmax(1))
        assert (padding.int().diff(dim=1) >= 0).all()


def test_windows_of_text_cover_it_and_held_out_ones_come_after() -> None:
    text = prose()
    data = load_data(DataConfig(source="prose"), "text")
    vocabulary = data.facts["vocabulary"]
    assert vocabulary == "".join(sorted(set(text)))
    train, held = (
        [detokenize(row + 3, vocabulary) for row in everything(part)["tokens"]] for part in data.splits(length=80)
    )
    n_train, n_held = len(data.train), len(data.held_out)
    assert n_held == len(text) // 10
    assert n_train + n_held == len(text)
    assert train == [text[start : start + 80] for start in range(0, n_train - 79, 10)]
    assert held == [text[start : start + 80] for start in range(n_train, len(text) - 79, 80)]


def test_longer_tokens_are_learned_from_the_training_part_and_spell_the_same_text() -> None:
    pytest.importorskip("tokenizers")
    text = prose()
    data = load_data(DataConfig(source="prose", tokens=300), "text")
    vocabulary = data.facts["vocabulary"]
    characters = sorted(set(text))
    assert vocabulary[: len(characters)] == tuple(characters)
    assert len(vocabulary) == len(set(vocabulary)) == 300
    train, held = data.splits(length=50)
    cut = len(text) - len(text) // 10
    assert text[:cut] == "".join(vocabulary[i] for i in train.tokens)
    assert text[cut:] == "".join(vocabulary[i] for i in held.tokens)
    assert all(string in text[:cut] for string in vocabulary[len(characters) :])
    assert (len(data.train), len(data.held_out)) == (len(train.tokens), len(held.tokens))
    assert len(train.tokens) < 0.6 * cut
    assert data.fingerprint != load_data(DataConfig(source="prose", tokens=301), "text").fingerprint
    seen = describe(DataConfig(source="prose", tokens=300))
    assert seen.fingerprint == data.fingerprint
    assert f"{len(train.tokens):,} tokens to train on" in str(seen)
    assert "vocabulary: 300 strings, the last ones" in str(seen)


def test_tokenize_takes_the_longest_string() -> None:
    vocabulary = ("a", "b", "c", "ab", "abcb", "bc")
    assert [vocabulary[i] for i in tokenize("text", "abcabcbbca", vocabulary)] == ["ab", "c", "abcb", "bc", "a"]
    with pytest.raises(ValueError, match=r"^prompt: expected characters of the vocabulary, got 'x', 'z'$"):
        tokenize("prompt", "azabx", vocabulary)
    assert doctest.testmod(_vocabulary).failed == 0


def test_prose_is_not_trained_on_what_is_held_out() -> None:
    text = prose()
    cut = len(text) - len(text) // 10
    seen = {text[start : start + 60] for start in range(cut - 59)}
    repeated = sum(text[start : start + 60] in seen for start in range(cut, len(text) - 59))
    assert repeated <= 0.03 * (len(text) - cut)


@pytest.mark.parametrize("length", [0, 40_000])
def test_windows_that_do_not_fit_are_rejected_with_both_lengths(length: int) -> None:
    data = load_data(DataConfig(source="prose"), "text")
    with pytest.raises(ValueError, match=f"{length}.*got|length: expected 1"):
        data.splits(length=length)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"held_out": 1}, "held_out: expected 2 or more (one item in so many), or 0, got 1"),
        ({"image_size": -8}, "image_size: expected 0 or more, got -8"),
        ({"image_size": 8.0}, "image_size: expected a whole number, got 8.0"),
        ({"tokens": -1}, "tokens: expected 0 or more, got -1"),
        ({"seconds": float("nan")}, "seconds: expected more than 0, got nan"),
        ({"seconds": "1"}, "seconds: expected a number, got '1'"),
        ({"source": ""}, "source: expected a bundled dataset, a path or hf:NAME, got an empty string"),
        ({"column": 3}, "column: expected a string, got 3"),
    ],
)
def test_options_out_of_range_are_rejected(options: dict[str, Any], error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(error)}$"):
        DataConfig(**options)


@pytest.mark.parametrize(
    ("source", "kind", "options", "error"),
    [
        ("prose", "images", {}, "prose: expected data of kind images (digits, textures, photos, a folder"),
        ("photos", "domains", {}, "photos: expected data of kind domains (textures, "),
        ("digits", "video", {}, "kind: expected one of images, pairs, domains, text, sequences, audio, got 'video'"),
        ("prose", "text", {"image_size": 8}, "prose: image_size: expected 0, as this source does not use it, got 8"),
        ("digits", "images", {"tokens": 300}, "digits: tokens: expected 0, as this source does not use it, got 300"),
        ("prose", "text", {"tokens": 50}, "tokens: expected more than prose has characters, 10"),
        ("digits", "images", {"items": 8}, "digits: items: expected 0, as this source does not use it, got 8"),
        ("textures", "images", {"image_size": 103}, "image_size: expected at most 102, the width of the held-out part"),
        ("textures", "images", {"items": 10**6}, "textures: items: expected fewer"),
        ("tones", "audio", {"items": 3}, "tones: items: expected at least 10 of them, got 3"),
        ("tones", "audio", {"seconds": 1e-5}, "seconds: expected at least one sample (0.000125 s), got 1e-05"),
        ("sums", "sequences", {"items": 10**6}, "sums: items: expected at most 200000, got 1000000"),
        (
            "no-such.npz",
            "images",
            {},
            "no-such.npz: expected digits, textures, photos, prose, reversal, sums, tones, hf:",
        ),
    ],
)
def test_kinds_and_options_that_a_source_does_not_have_are_rejected(
    source: str, kind: str, options: dict[str, Any], error: str
) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(error)):
        load_data(DataConfig(source=source, **options), kind)


@pytest.mark.parametrize(("source", "kind"), [(source, kind) for source, kind, _ in SERVED])
def test_descriptions_name_kind_facts_sizes_and_fingerprint(source: str, kind: str) -> None:
    config = DataConfig(source=source, **SMALL.get(source, {}))
    seen, data = describe(config, kind), load_data(config, kind)
    assert (seen.kind, seen.facts, seen.fingerprint) == (kind, data.facts, data.fingerprint)
    assert set(seen.kinds) == {kind for other, kind, _ in SERVED if other == source}
    if kind != "text":
        assert (seen.train, seen.held_out) == tuple(map(len, data.splits()))
    assert all(len(examples) == 8 for examples in seen.examples.values())
    for part in (source, kind, f"{seen.train:,}", seen.fingerprint):
        assert part in str(seen)
    assert ("warning: only" in str(seen)) == (source in SMALL)


def test_descriptions_count_classes() -> None:
    seen = describe(DataConfig())
    assert list(seen.classes) == list("0123456789")
    assert sum(seen.classes.values()) == 1797
    assert seen.value_range == (0, 1)
    assert not seen.warnings


def test_bundled_tones_have_pitches_a_semitone_apart_and_four_timbres() -> None:
    data = load_data(DataConfig(source="tones", items=300), "audio")
    batch = everything(data.train)
    audio, labels = batch["audio"].double(), batch["labels"]
    assert (harmonicity(audio, 8000) > 0.99).all()
    peak = audio.abs().amax(1)
    assert 0.39 < peak.min() < 0.45
    assert 0.85 < peak.max() < 0.91
    power = torch.fft.rfft(audio * torch.hann_window(8000)).abs().square()
    pitches = 110 * 2 ** (torch.arange(24) / 12)
    at = [power[:, (pitches * k).round().long()[:, None] + torch.arange(-3, 4)].sum(-1) for k in (1, 2, 3)]
    fits = at[0] + at[1] + at[2]
    pitch = fits.argmax(1, keepdim=True)
    assert set(pitch.flatten().tolist()) == set(range(24))
    first, second, third = (each.gather(1, pitch).sqrt() for each in at)
    ratios = torch.cat((second / first, third / first), 1)
    timbres = torch.tensor([(0.7, 0.5), (5 / 3, 0.5), (0.3, 0.1), (0.05, 0.6)]).double()
    distance = ((ratios[:, None] - timbres).abs() / timbres).amax(-1)
    assert (distance.amin(1) < 0.25).all()  # 1.1 / 0.9
    assert set(distance.argmin(1).tolist()) == {0, 1, 2, 3}
    assert torch.equal(labels, distance.argmin(1) * 24 + pitch[:, 0])
    names = list(data.classes)
    assert names[:4] == ["string-A2", "string-A#2", "string-B2", "string-C3"]
    assert (names[24], names[95]) == ("bright-string-A2", "reed-G#4")
    assert sum(data.classes.values()) == 300
