"""Seq2Seq: training, greedy and beam search, errors."""

from __future__ import annotations

import doctest
import itertools
import math

import pytest
import torch
from torch import Tensor

from fastgen.batch import END, PADDING, START, detokenize
from fastgen.models import seq2seq
from fastgen.models.base import StepContext, Texts, from_data
from fastgen.models.seq2seq import DecodingOptions, Seq2Seq, Seq2SeqConfig

NOW = StepContext(1, 10)
VARIANTS = {
    "default": {},
    "odd sizes": {"width": 18, "num_heads": 3, "source_length": 5, "target_length": 9, "mlp_width": 7},
    "one block": {"encoder_depth": 1, "decoder_depth": 1},
}


def small_model(**options: object) -> Seq2Seq:
    torch.manual_seed(0)
    sizes = {"vocabulary": "abcd", "source_length": 7, "target_length": 6, "width": 16, "num_heads": 2, **options}
    return Seq2Seq(Seq2SeqConfig(**sizes))  # type: ignore[arg-type]


def rows(*texts: str, length: int) -> Tensor:
    """Texts over "abcd" as padded tokens."""
    tokens = [[START, *("abcd".index(c) + 3 for c in text), END] for text in texts]
    return torch.tensor([row + [PADDING] * (length - len(row)) for row in tokens])


def batch_of(model: Seq2Seq, *pairs: tuple[str, str]) -> dict[str, Tensor]:
    lengths = {"source": model.config.source_length, "target": model.config.target_length}
    sides = zip(lengths.items(), zip(*pairs, strict=True), strict=True)
    return {name: rows(*texts, length=length) for (name, length), texts in sides}


PAIRS = (("abc", "cba"), ("d", "d"), ("ba", "ab"))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_no_prediction_depends_on_later_tokens_or_on_padding() -> None:
    model = small_model().double().eval()
    source, target = batch_of(model, *PAIRS).values()
    before = model(source, target[:, :-1])
    changed = target.clone()
    changed[:, 3:] = 6
    after = model(source, changed[:, :-1])
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3], after[:, 3])
    longer = small_model(source_length=11).double().eval()  # the same, with four more tokens of padding
    state = model.state_dict()
    state["source_positions"] = torch.cat((state["source_positions"], torch.randn(4, 16).double()))
    longer.load_state_dict(state)
    torch.testing.assert_close(longer(torch.nn.functional.pad(source, (0, 4)), target), model(source, target))


def test_loss_and_score_are_the_cross_entropy_without_padding() -> None:
    model = small_model().eval()
    batch = batch_of(model, *PAIRS)
    log_prob = model(batch["source"], batch["target"]).log_softmax(2)
    wanted = torch.stack(
        [
            -sum(log_prob[i, j, token] for j, token in enumerate([*("abcd".index(c) + 3 for c in target), END]))
            for i, (_, target) in enumerate(PAIRS)
        ]
    )
    scores = model.score(batch)
    torch.testing.assert_close(scores["nll"], wanted)
    assert scores["tokens"].tolist() == [4.0, 2.0, 3.0]
    torch.testing.assert_close(model.loss("target", batch, NOW)["loss"], wanted.sum() / 9)


def test_training_makes_greedy_decoding_exact() -> None:
    model = small_model(width=32)
    batch = batch_of(model, *PAIRS, ("abcd", "dcba"))
    (phase,) = model.phases()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, phase.betas)
    assert model.score(batch)["exact"].tolist() == [0.0] * 4
    values = []
    for _ in range(40):
        loss = model.loss("target", batch, NOW)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.1 * values[0]
    assert model.score(batch)["exact"].tolist() == [1.0] * 4
    assert model.draw(1, DecodingOptions(source="abcd", num_beams=3)).texts == ["abcd -> dcba"]
    shown = model.visualize(batch)["decoded"]
    assert isinstance(shown, Texts)
    assert shown.texts[0].split() == ["source", "abc", "expected", "cba", "decoded", "cba"]


# --------------------------------------------------------------------------------------------------
# Decoding


class Uncached(Seq2Seq):
    """Every step by a full forward."""

    def _next_logits(self, text, memory, mask, caches):
        return self._decode(text, memory, mask)[:, -1]


DECODINGS = {
    "greedy": DecodingOptions(),
    "two beams": DecodingOptions(num_beams=2),
    "more beams than tokens": DecodingOptions(num_beams=11),
    "sampled": DecodingOptions(temperature=1.5),
}


def lively(model: Seq2Seq) -> Seq2Seq:
    """Scales the weights so that every token changes those after it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2.5)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", DECODINGS)
def test_cached_decoding_equals_full_forwards(case: str, variant: str) -> None:
    model = lively(small_model(**VARIANTS[variant]).double())
    uncached = Uncached(model.config).double()
    uncached.load_state_dict(model.state_dict())
    source = rows("abc", "d", "dba", "bb", "a", "cca", length=model.config.source_length)
    ours = model.decode(source, DECODINGS[case], generator=seeded(3))
    assert torch.equal(ours, uncached.decode(source, DECODINGS[case], generator=seeded(3)))
    assert len({tuple(row) for row in ours.tolist()}) > 1
    assert model.training
    for row in ours.tolist():
        assert row[0] == START
        text = row[1 : row.index(END)] if END in row else row[1:]
        assert min(text, default=3) >= 3
        assert not any(row[2 + len(text) :])


def test_greedy_decoding_takes_the_most_likely_token() -> None:
    model = lively(small_model().double()).eval()
    source = rows("abc", "dd", length=7)
    for item, decoded in zip(source, model.decode(source), strict=True):
        text = [START]
        while len(text) < 6 and text[-1] != END:
            logits = model(item[None], torch.tensor([text]))[0, -1]
            text.append(int(logits[END:].argmax()) + END)
        assert decoded.tolist() == text + [PADDING] * (6 - len(text))


def test_beams_for_every_prefix_find_the_most_likely_target() -> None:
    """Of all 85 targets of up to three characters, with or without an end."""
    model = lively(small_model(target_length=4).double()).eval()
    source = rows("abc", "d", "ba", length=7)
    targets = []
    for n in range(4):
        for text in itertools.product(range(3, 7), repeat=n):
            targets.append(([START, *text, END] + [PADDING] * 4)[:4])
    everything = torch.tensor(targets)
    best = []
    for item in source:
        log_prob = model(item.expand(len(everything), -1), everything[:, :-1]).log_softmax(2)
        wanted = everything[:, 1:]
        of_tokens = log_prob.gather(2, wanted[..., None])[..., 0].where(wanted != PADDING, 0)
        best.append(everything[of_tokens.sum(1).argmax()])
    assert torch.equal(model.decode(source, DecodingOptions(num_beams=64)), torch.stack(best))


def test_sources_are_random_texts_of_the_vocabulary_or_the_given_one() -> None:
    model = small_model(dropout=0.3)
    samples = model.draw(20, DecodingOptions(), generator=seeded(7)).texts
    sources = [text.split(" -> ")[0] for text in samples]
    assert {len(source) for source in sources} == {2, 3, 4, 5}
    assert set("".join(sources)) <= set("abcd")
    samples = model.draw(20, DecodingOptions(source="ab", temperature=9.0), generator=seeded(7)).texts
    assert len(set(samples)) > 5
    assert all(text.startswith("ab -> ") for text in samples)
    assert detokenize([START, 3, 5, END, 4], "abcd") == "ac"


def test_decoding_does_not_run_compiled_code() -> None:
    model = small_model()
    counted = []
    model.compile(backend=lambda graph, inputs: counted.append(graph) or graph)
    model.decode(rows("abc", length=7))
    assert not counted


# --------------------------------------------------------------------------------------------------
# Errors and files

CONFIG_ERRORS = {
    "a character twice": ({"vocabulary": "abca"}, "vocabulary: expected distinct characters, got 'a' more than once"),
    "no characters": ({"vocabulary": ""}, "vocabulary: expected a string of at least one character, got ''"),
    "no room in a target": ({"target_length": 2}, "target_length: expected 3 or more: start, a character, end, got 2"),
    "no encoder": ({"encoder_depth": 0}, "encoder_depth: expected a positive integer, got 0"),
    "heads of odd size": ({"width": 9, "num_heads": 3}, "width: expected an even multiple of num_heads = 3, got 9"),
    "a negative mlp": ({"mlp_width": -1}, "mlp_width: expected an integer >= 0, got -1"),
    "certain dropout": ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
    "a learning rate of 0": ({"learning_rate": 0.0}, "learning_rate: expected a positive number, got 0.0"),
    "negative decay": ({"weight_decay": -0.1}, "weight_decay: expected a number >= 0, got -0.1"),
}
OPTION_ERRORS = {
    "a source of bytes": ({"source": b"a"}, "source: expected a string, got bytes"),
    "no beams": ({"num_beams": 0}, "num_beams: expected a positive integer, got 0"),
    "negative temperature": ({"temperature": -1.0}, "temperature: expected a number >= 0, got -1.0"),
    "temperature NaN": ({"temperature": math.nan}, "temperature: .*got nan"),
    "beams with a temperature": (
        {"num_beams": 2, "temperature": 1.0},
        "num_beams: expected 1 with a temperature above 0, got 2",
    ),
}


@pytest.mark.parametrize("mistake", [*CONFIG_ERRORS, *OPTION_ERRORS])
def test_invalid_configs_and_sampling_options_raise_an_error_that_names_the_option(mistake: str) -> None:
    options, message = {**CONFIG_ERRORS, **OPTION_ERRORS}[mistake]
    with pytest.raises(ValueError, match=f"^{message}"):
        (Seq2SeqConfig if mistake in CONFIG_ERRORS else DecodingOptions)(**options)  # type: ignore[arg-type]


CALL_ERRORS = {
    "unknown characters": (
        lambda model: model.draw(1, DecodingOptions(source="abz")),
        ValueError,
        "^source: expected characters of the vocabulary, got 'z'",
    ),
    "a long source": (
        lambda model: model.draw(1, DecodingOptions(source="abcabc")),
        ValueError,
        "^source: expected at most 5 characters, .*, got 6",
    ),
    "floating tokens": (
        lambda model: model.decode(torch.zeros(2, 7)),
        TypeError,
        "^source: expected an int64 tensor, got torch.float32",
    ),
    "sources of another length": (
        lambda model: model.decode(rows("a", length=9)),
        ValueError,
        r"^source: expected shape \(B, source_length\) = \(1, 7\), got \(1, 9\)",
    ),
    "targets beyond the table": (
        lambda model: model(rows("a", length=7), rows("a", length=9)),
        ValueError,
        r"^target: expected \(B, N\) with N from 1 to target_length = 6, got \(1, 9\)",
    ),
}


@pytest.mark.parametrize("mistake", CALL_ERRORS)
def test_invalid_arguments_raise_an_error_that_names_the_argument(mistake: str) -> None:
    call, error, message = CALL_ERRORS[mistake]
    with pytest.raises(error, match=message):
        call(small_model())


def test_vocabulary_and_lengths_come_from_the_data() -> None:
    assert from_data(Seq2SeqConfig) == ["vocabulary", "source_length", "target_length"]


def test_examples_in_docstrings_run() -> None:
    results = doctest.testmod(seq2seq, extraglobs={"torch": torch})
    assert results.attempted
    assert results.failed == 0
