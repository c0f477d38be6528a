"""The recurrent GAN of images, text and pairs of texts."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from torch import Tensor

from fastgen import losses
from fastgen.models import recurrent_gan
from fastgen.models.base import Images, NoOptions, StepContext, from_data
from fastgen.models.recurrent_gan import RecurrentGAN, RecurrentGANConfig, TextCharacters

NOW = StepContext(1, 10)
VARIANTS = {
    "images": {"kind": "images", "image_size": 5, "channels": 3},
    "text": {"kind": "text", "text_length": 6},
    "pairs": {"source_length": 3, "target_length": 7},
    "r1": {"penalty": "r1"},
    "gradient": {"penalty": "gradient", "loss": "wasserstein"},
}


def small_model(**options: object) -> RecurrentGAN:
    torch.manual_seed(0)
    sizes = {"vocabulary": "abc", "source_length": 6, "target_length": 5, "generator_width": 12, "critic_width": 7}
    return RecurrentGAN(RecurrentGANConfig(**{"kind": "sequences", **sizes, **options}))  # type: ignore[arg-type]


def rows(*texts: str, length: int) -> Tensor:
    """Tokens of texts over "abc", as the data have them."""
    tokens = [[1, *("abc".index(c) + 3 for c in text), 2] for text in texts]
    return torch.tensor([row + [0] * (length - len(row)) for row in tokens])


def batch_of(model: RecurrentGAN, *pairs: tuple[str, str]) -> dict[str, Tensor]:
    sources, targets = zip(*pairs, strict=True)
    config = model.config
    return {
        "source": rows(*sources, length=config.source_length),
        "target": rows(*targets, length=config.target_length),
    }


PAIRS = (("a", "bcc"), ("b", "c"), ("c", "ab"), ("a", "a"))


def any_batch(model: RecurrentGAN) -> dict[str, Tensor]:
    """Four items of the model's kind."""
    config = model.config
    if config.kind == "images":
        size = config.image_size
        weight = next(model.parameters())
        return {"images": torch.rand(4, config.channels, size, size, generator=seeded(9)).to(weight)}
    if config.kind == "text":
        return {"tokens": torch.randint(0, 3, (4, config.text_length), generator=seeded(9))}
    return batch_of(model, *PAIRS)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def step(model: RecurrentGAN, phase: str, batch: dict[str, Tensor], autocast: bool = False) -> dict[str, Tensor]:
    for other in model.phases():
        model.get_submodule(other.name).requires_grad_(other.name == phase)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        values = model.loss(phase, batch, NOW)
    values["loss"].backward()
    return values


def test_a_pair_is_one_sequence_of_one_hot_vectors() -> None:
    model = small_model()
    sequences = model._encode(batch_of(model, ("abca", "c"), ("b", "aab")))
    assert sequences.shape == (2, 9, 5)
    assert sequences.argmax(2).tolist() == [[2, 3, 4, 2, 1, 4, 1, 0, 0], [3, 1, 2, 2, 3, 1, 0, 0, 0]]
    assert (sequences.sum(2) == 1).all()
    assert [model.format.detokenize(row) for row in sequences.argmax(2).tolist()] == ["abca -> c", "b -> aab"]


SPELLED = {
    "no end": ([2, 2, 2, 2], "aaa" + "a"),
    "one end": ([2, 1, 3, 0], "a -> b"),
    "nothing": ([0, 0, 0, 0], ""),
    "padding inside": ([2, 0, 1, 3], "a_ -> b"),
    "more after the second end": ([2, 1, 3, 1, 4, 0], "a -> b|c"),
    "empty sides": ([1, 1, 0, 0], " -> "),
}


@pytest.mark.parametrize("case", SPELLED)
def test_malformed_pairs_are_spelled_with_markers(case: str) -> None:
    symbols, text = SPELLED[case]
    assert small_model().format.detokenize(symbols) == text


@pytest.mark.parametrize(
    ("symbols", "formed"),
    [
        ([2, 1, 3, 1, 0, 0], 1.0),
        ([2, 2, 1, 3, 3, 1], 1.0),
        ([2, 1, 3, 1, 0, 2], 0.0),
        ([2, 0, 1, 3, 1, 0], 0.0),
        ([1, 2, 1, 0, 0, 0], 0.0),
        ([2, 1, 1, 0, 0, 0], 0.0),
        ([2, 1, 2, 2, 2, 2], 0.0),
        ([2, 1, 2, 1, 2, 1], 0.0),
        ([0, 0, 0, 0, 0, 0], 0.0),
    ],
    ids=str,
)
def test_the_score_marks_well_formed_sequences(monkeypatch, symbols: list[int], formed: float) -> None:
    model = small_model(source_length=4, target_length=4)
    samples = torch.nn.functional.one_hot(torch.tensor(symbols), 5)
    monkeypatch.setattr(model, "_generate", lambda n, generator: samples.expand(n, -1, -1))
    scores = model.score(batch_of(model, ("a", "b"), ("b", "a")))
    assert scores["well formed"].tolist() == [formed] * 2
    real = model._encode(batch_of(model, ("a", "b"), ("b", "a")))
    torch.testing.assert_close(scores["real"], model.critic(real).mean(1))


def test_images_are_sequences_of_rows() -> None:
    model = small_model(kind="images", image_size=4, channels=3)
    batch = any_batch(model)
    steps = model._encode(batch)
    assert steps.shape == (4, 4, 12)
    assert torch.equal(steps[2, 1], 2 * batch["images"][2, :, 1].flatten() - 1)
    back = model.format.decode(steps)
    assert isinstance(back, Images)
    torch.testing.assert_close(back.pixels, batch["images"])
    samples = model.draw(3, NoOptions()).pixels
    assert samples.shape == (3, 3, 4, 4)
    assert 0 <= samples.min() < samples.max() <= 1


def test_known_triples_are_the_character_triples_that_other_texts_have() -> None:
    characters = TextCharacters("abcd", 5)

    def one_hot(*texts: str) -> Tensor:
        return characters.encode({"tokens": torch.tensor([["abcd".index(c) for c in text] for text in texts])})

    real = one_hot("aaaaa", "abcab", "bcabc")
    samples = one_hot("bcaaa", "ddddd", "abcaa")
    metrics = characters.metrics(samples, real)
    known = [["bca", "caa", "aaa"], ["ddd"] * 3, ["abc", "bca", "caa"]]
    others = [{"abc", "bca", "cab"}, {"aaa", "bca", "cab", "abc"}, {"aaa", "abc", "bca", "cab"}]
    expected = [sum(t in has for t in mine) / 3 for mine, has in zip(known, others, strict=True)]
    torch.testing.assert_close(metrics["known triples"], torch.tensor(expected).double())
    assert metrics["known triples, real"].tolist() == [0.0, 1.0, 1.0]
    assert characters.decode(samples).texts == ["bcaaa", "ddddd", "abcaa"]


def test_hard_outputs_are_one_hot_with_the_gradient_of_soft_ones() -> None:
    hard, soft = small_model().double(), small_model(hard=False).double()
    weights = torch.randn(5, dtype=torch.float64, generator=seeded(1))
    logits = torch.randn(4, 5, dtype=torch.float64, generator=seeded(2))
    gradients = []
    for model in (hard, soft):
        x = logits.clone().requires_grad_()
        output = model.generator.sample(x)
        torch.testing.assert_close(output.sum(1), torch.ones(4, dtype=torch.float64))
        gradients.append(torch.autograd.grad((output * weights).sum(), x)[0])
    torch.testing.assert_close(*gradients)
    samples = hard._generate(6, seeded(3)).detach()
    torch.testing.assert_close(samples.amax(2), torch.ones_like(samples[..., 0]))


def test_symbols_are_sampled_with_the_probabilities_of_the_logits() -> None:
    model = small_model(source_length=3, target_length=3, logit_scale=2.0)
    with torch.no_grad():
        for parameter in model.generator.parameters():
            parameter.zero_()
        expected = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
        model.generator.out.bias.copy_(expected.log() / 2)
    samples = model._generate(5000, seeded(4)).argmax(2)
    share = torch.bincount(samples.flatten(), minlength=5) / samples.numel()
    torch.testing.assert_close(share, expected, rtol=0, atol=0.012)


def test_forward_takes_gumbel_noise_for_symbols_only() -> None:
    symbols, images = small_model(), small_model(kind="images", image_size=4)
    noise = torch.randn(2, symbols.format.length, 16, generator=seeded(0))
    gumbel = torch.randn(2, symbols.format.length, symbols.format.width, generator=seeded(1))
    assert symbols(noise, gumbel).shape == gumbel.shape
    assert images(noise[:, :4]).shape == (2, 4, 4)
    with pytest.raises(ValueError, match=r"gumbel: expected Gumbel noise .*, got none"):
        symbols(noise)
    with pytest.raises(ValueError, match="gumbel: expected none for images, got a tensor"):
        images(noise[:, :4], gumbel)


def test_the_generator_is_autoregressive() -> None:
    model = small_model(hard=False).double()
    noise, gumbel = (torch.randn(1, 9, n, dtype=torch.float64, generator=seeded(n)) for n in (16, 5))
    before = model.generator(noise, gumbel)
    changed = gumbel.clone()
    changed[:, 4] += torch.arange(5)
    after = model.generator(noise, changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 5], after[:, 5])


def test_the_critic_is_causal_and_linear_in_each_symbol() -> None:
    """The gradient of a score with respect to its symbol is the score of every alternative symbol."""
    critic = small_model().double().critic
    symbols = torch.randint(0, 5, (2, 9), generator=seeded(5))
    sequences = torch.nn.functional.one_hot(symbols, 5).double().requires_grad_()
    scores = critic(sequences)
    assert scores.shape == (2, 9)
    (gradient,) = torch.autograd.grad(scores[:, 4].sum(), sequences)
    assert gradient[:, :5].abs().sum(2).all()
    assert not gradient[:, 5:].any()
    for other in range(5):
        changed = sequences.detach().clone()
        changed[:, 4] = torch.eye(5, dtype=torch.float64)[other]
        again = critic(changed)
        torch.testing.assert_close(again[:, 4], gradient[:, 4, other])
        assert torch.equal(again[:, :4], scores[:, :4])


@pytest.mark.parametrize("kind", ["images", "text", "sequences"])
def test_defaults_depend_on_the_kind(kind: str) -> None:
    expected = (2.0, 1e-3, 1e-3) if kind == "images" else (0.1, 3e-3, 2e-3)
    model = small_model(kind=kind)
    rates = tuple(phase.learning_rate for phase in model.phases())
    assert (model.config.chosen("penalty_weight"), *rates) == expected
    config = RecurrentGANConfig(kind=kind, penalty_weight=0.0, critic_learning_rate=0.5)  # type: ignore[arg-type]
    assert (config.chosen("penalty_weight"), config.chosen("critic_learning_rate")) == (0.0, 0.5)


@pytest.mark.parametrize("variant", ["images", "text", "pairs", "r1", "gradient"])
def test_a_penalty_adds_its_weight_times_itself_and_has_the_right_gradient(variant: str) -> None:
    model = small_model(**VARIANTS[variant], penalty_weight=3.0).double()
    plain = small_model(**{**VARIANTS[variant], "penalty": "none"}).double()
    batch = any_batch(model)
    torch.manual_seed(2)
    values = step(model, "critic", batch)
    torch.manual_seed(2)
    without = step(plain, "critic", batch)
    assert "penalty" not in without
    assert values["penalty"] > 0
    torch.testing.assert_close(values["loss"], without["loss"] + 3 * values["penalty"])

    def loss_at(offset: float) -> Tensor:
        with torch.no_grad():
            model.critic.gru.weight_hh_l0[0, 0] += offset
        torch.manual_seed(2)
        value = model.loss("critic", batch, NOW)["loss"].detach()
        with torch.no_grad():
            model.critic.gru.weight_hh_l0[0, 0] -= offset
        return value

    gradient = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    weight = model.critic.gru.weight_hh_l0
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0, 0], gradient, rtol=1e-5, atol=1e-9)


def test_the_gradient_scaler_does_not_change_the_penalty() -> None:
    model = small_model()
    penalties = []
    for scaler in (None, torch.amp.GradScaler("cpu")):
        torch.manual_seed(2)
        penalties.append(model.loss("critic", batch_of(model, *PAIRS), StepContext(1, 10, scaler))["penalty"])
    torch.testing.assert_close(*penalties)


@pytest.mark.parametrize("penalty", ["r1", "r1-r2"])
def test_penalties_of_real_and_generated_sequences(penalty: str) -> None:
    model = small_model(penalty=penalty).double()
    batch = batch_of(model, *PAIRS)
    torch.manual_seed(2)
    fake = model._generate(4).detach().requires_grad_()
    real = model._encode(batch).requires_grad_()
    expected = losses.r1_penalty(model.critic(real).mean(1), real)
    if penalty == "r1-r2":
        expected = expected + losses.r2_penalty(model.critic(fake).mean(1), fake)
    torch.manual_seed(2)
    torch.testing.assert_close(model.loss("critic", batch, NOW)["penalty"], expected.detach())


def test_training_both_networks_fits_the_data() -> None:
    """The data are one sequence."""
    model = small_model(source_length=4, target_length=3, critic_steps=1, generator_width=64, critic_width=32)
    batch = batch_of(model, *[("ab", "c")] * 16)
    optimizers = {
        p.name: torch.optim.AdamW(model.get_submodule(p.name).parameters(), 5e-3, p.betas) for p in model.phases()
    }
    assert model.draw(50, NoOptions(), generator=seeded(0)).texts.count("ab -> c") < 5
    for _ in range(90):
        for phase, optimizer in optimizers.items():
            step(model, phase, batch)
            optimizer.step()
    assert model.draw(50, NoOptions(), generator=seeded(0)).texts.count("ab -> c") > 40


def test_phases() -> None:
    first, second = small_model(critic_steps=5, generator_learning_rate=3e-3).phases()
    assert (first.name, first.networks, first.repeats) == ("critic", ("critic",), 5)
    assert (second.name, second.networks, second.repeats) == ("generator", ("generator",), 1)
    assert second.learning_rate == 3e-3
    assert RecurrentGAN.averaged == ("generator",)


CONFIG_ERRORS = {
    "a repeated character": ({"vocabulary": "aa"}, "vocabulary: expected distinct characters, got 'a' more than once"),
    "a short source": (
        {"source_length": 2},
        "source_length: expected 3 or more: start, a character, end, got 2",
    ),
    "another kind": ({"kind": "audio"}, "kind: expected one of images, text, sequences, got 'audio'"),
    "short texts": ({"text_length": 2}, "text_length: expected 3 or more characters, got 2"),
    "no noise": ({"noise_dim": 0}, "noise_dim: expected a positive integer, got 0"),
    "an unknown loss": ({"loss": "huber"}, "loss: expected one of minimax, .*, got 'huber'"),
    "an unknown penalty": ({"penalty": "r3"}, "penalty: expected one of none, r1, r1-r2, gradient, got 'r3'"),
    "a temperature of 0": ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
    "no scale of logits": ({"logit_scale": 0.0}, "logit_scale: expected a positive number, got 0.0"),
    "a learning rate NaN": ({"critic_learning_rate": math.nan}, "critic_learning_rate: expected a positive number"),
    "a negative weight": ({"penalty_weight": -1.0}, "penalty_weight: expected a number >= 0, got -1.0"),
    "a beta of 1": ({"beta1": 1.0}, r"beta1: expected a probability in \[0, 1\), got 1.0"),
}


@pytest.mark.parametrize("mistake", CONFIG_ERRORS)
def test_invalid_configs_raise_an_error_that_names_the_option(mistake: str) -> None:
    options, message = CONFIG_ERRORS[mistake]
    with pytest.raises(ValueError, match=f"^{message}"):
        RecurrentGANConfig(**options)  # type: ignore[arg-type]


CALL_ERRORS = {
    "floating tokens": (
        lambda m: m.score({"source": torch.zeros(2, 6), "target": torch.zeros(2, 5)}),
        TypeError,
        "source: expected an int64 tensor, got torch.float32",
    ),
    "images of another size": (
        lambda m: small_model(kind="images").score({"images": torch.zeros(2, 1, 7, 7)}),
        ValueError,
        r"images: expected shape \(B, C, S, S\) = \(2, 1, 8, 8\), got \(2, 1, 7, 7\)",
    ),
    "texts of another length": (
        lambda m: small_model(kind="text").score({"tokens": torch.zeros(2, 7, dtype=torch.int64)}),
        ValueError,
        r"tokens: expected shape \(B, length\) = \(2, 16\), got \(2, 7\)",
    ),
    "targets of another length": (
        lambda m: m.score({"source": rows("a", length=6), "target": rows("a", length=6)}),
        ValueError,
        r"target: expected shape \(B, target_length\) = \(1, 5\), got \(1, 6\)",
    ),
}


@pytest.mark.parametrize("mistake", CALL_ERRORS)
def test_invalid_arguments_raise_an_error_that_names_the_argument(mistake: str) -> None:
    call, error, message = CALL_ERRORS[mistake]
    with pytest.raises(error, match=f"^{message}"):
        call(small_model())


def test_the_kind_and_its_sizes_come_from_the_data() -> None:
    names = ["kind", "image_size", "channels", "vocabulary", "source_length", "target_length"]
    assert from_data(RecurrentGANConfig) == names
    assert RecurrentGAN.kinds == ("images", "text", "sequences")
    lengths = [RecurrentGANConfig(kind=kind, text_length=9).data_options() for kind in RecurrentGAN.kinds]
    assert lengths == [{}, {"length": 9}, {}]
    assert [small_model(kind=kind).kind for kind in RecurrentGAN.kinds] == list(RecurrentGAN.kinds)


def test_examples_in_docstrings_run() -> None:
    results = doctest.testmod(recurrent_gan, extraglobs={"torch": torch})
    assert results.attempted
    assert results.failed == 0
