"""WaveNet: mu-law, mixtures, training, cached sampling, errors."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.models import wavenet
from fastgen.models.audio_levels import (
    inverse_mu_law,
    level_borders,
    logistics_level_logits,
    logistics_log_prob,
    mu_law,
)
from fastgen.models.base import Sounds, StepContext, from_data
from fastgen.models.decoding import choose
from fastgen.models.sizes import DataSize
from fastgen.models.wavenet import SoundOptions, WaveNet, WaveNetConfig

NOW = StepContext(1, 10)
VARIANTS = {
    "default": {},
    "levels": {"output": "levels"},
    "odd sizes": {"channels": 3, "skip_channels": 7, "cycle": 4, "cycles": 1, "length": 37, "components": 1},
    "one layer": {"cycle": 1, "cycles": 1, "reach": 1},
    "predictors": {"predictors": 7},
    "conditional": {"classes": 3, "conditional": True, "predictors": 2, "reach": 3},
}


def small_model(**options: object) -> WaveNet:
    torch.manual_seed(0)
    sizes = {"sample_rate": 100, "length": 40, "channels": 6, "skip_channels": 8, "cycle": 3, "cycles": 2}
    return WaveNet(WaveNetConfig(**{**sizes, "reach": 5, "crop": 10, **options}))  # type: ignore[arg-type]


def waves(n: int, model: WaveNet) -> Tensor:
    time = torch.arange(model.config.length) / 10
    phase = torch.rand(n, 1, generator=seeded(1)) * 6
    return 0.8 * (time + phase).sin()


def random_levels(n: int, length: int) -> Tensor:
    return torch.randint(0, 256, (n, length), generator=seeded(2))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_mu_law_follows_the_formula_and_is_inverted() -> None:
    levels = torch.arange(256)
    assert torch.equal(mu_law(inverse_mu_law(levels)), levels)
    assert mu_law(torch.tensor([-1.0, 1.0, -2.0, 3.0])).tolist() == [0, 255, 0, 255]
    for sample in (-0.7, -0.01, 0.0, 0.003, 0.2):
        compressed = math.copysign(math.log(1 + 255 * abs(sample)) / math.log(256), sample)
        assert mu_law(torch.tensor([sample])).item() == math.floor((compressed + 1) / 2 * 255 + 0.5)
    audio = torch.linspace(-1, 1, 1001)
    error = (inverse_mu_law(mu_law(audio)) - audio).abs()
    assert (error <= 0.5 * math.log(256) / 255 * 2 * (audio.abs() + 1 / 255) * 1.02).all()  # half a step


def test_a_prediction_depends_on_the_samples_of_its_field_and_no_others() -> None:
    model = small_model().double()
    field = model.config.field
    assert field == 19
    levels = random_levels(1, 40)
    before = model(levels)[0, 30]
    for place in range(40):
        changed = levels.clone()
        changed[0, place] = 255 - changed[0, place]
        assert torch.equal(model(changed)[0, 30], before) == (not 30 - field <= place < 30), place


def test_with_predictors_it_depends_on_the_samples_of_their_errors_too() -> None:
    model = small_model(predictors=3).double()
    with torch.no_grad():
        model.errors.weight.add_(0.3)
    field = model.config.field
    assert field == 14 + 5 + 3
    levels = random_levels(1, 40)
    before = model(levels)[0, 30]
    for place in range(40):
        changed = levels.clone()
        changed[0, place] = 255 - changed[0, place]
        assert torch.equal(model(changed)[0, 30], before) == (not 30 - field <= place < 30), place


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("last", [1, 7, 20])
def test_the_last_predictions_alone_are_those_of_all(variant: str, last: int) -> None:
    """From all samples, and from just those that they depend on."""
    model = small_model(**VARIANTS[variant]).double()
    levels, labels = random_levels(2, 37), torch.tensor([2, 0])
    wanted = model(levels, labels=labels)[:, -last:]
    torch.testing.assert_close(model(levels, last, labels), wanted)
    torch.testing.assert_close(model(levels[:, -last - model.config.field :], last, labels), wanted)


def test_a_layer_is_a_dilated_causal_convolution_with_a_gate() -> None:
    model = small_model(cycle=3).double()
    layer = list(model.layers)[2]
    assert layer.dilation == 4
    x = torch.randn(2, 20, 6, dtype=torch.float64, generator=seeded(3))
    weight = layer.taps.weight.view(12, 2, 6).transpose(1, 2)
    both = F.conv1d(F.pad(x.transpose(1, 2), (4, 0)), weight, layer.taps.bias, dilation=4)
    gated = both[:, :6].tanh() * both[:, 6:].sigmoid()
    out = F.conv1d(gated, layer.out.weight[..., None], layer.out.bias).transpose(1, 2)
    y, skip = layer(x, 20)
    torch.testing.assert_close(y, x + out[..., :6])
    torch.testing.assert_close(skip, out[..., 6:])


def test_loss_and_score_are_the_cross_entropy_of_the_samples() -> None:
    model = small_model(crop=0)
    audio = waves(3, model)
    levels = mu_law(audio)
    wanted = -model(levels).log_softmax(2).gather(2, levels[..., None])[..., 0]
    scores = model.score({"audio": audio})
    torch.testing.assert_close(scores["nll"], wanted.double().sum(1))
    assert scores["tokens"].tolist() == [40.0] * 3
    torch.testing.assert_close(model.loss("sound", {"audio": audio}, NOW)["loss"], wanted.mean())


def test_a_crop_s_loss_depends_on_the_samples_before_it() -> None:
    """Each of the crops, from the sound's beginning to its end, by the seed of torch's generator."""
    model = small_model(crop=10).double()
    audio = waves(2, model).double()
    levels = mu_law(audio)
    nll = -model(levels).log_softmax(2).gather(2, levels[..., None])[..., 0]
    starts = set()
    for seed in range(12):
        torch.manual_seed(seed)
        start = max(0, int(torch.randint(-9, 31, ())))
        starts.add(start)
        torch.manual_seed(seed)
        loss = model.loss("sound", {"audio": audio}, NOW)["loss"]
        torch.testing.assert_close(loss, nll[:, start : start + 10].mean())
    assert 0 in starts
    assert max(starts) > 10


def test_the_beginning_of_a_sound_is_trained_more_often_with_onset() -> None:
    """With a share of 1, always."""
    model = small_model(crop=10, onset=1.0).double()
    audio = waves(2, model).double()
    levels = mu_law(audio)
    nll = -model(levels).log_softmax(2).gather(2, levels[..., None])[..., 0]
    for seed in range(4):
        torch.manual_seed(seed)
        torch.testing.assert_close(model.loss("sound", {"audio": audio}, NOW)["loss"], nll[:, :10].mean())


@pytest.mark.parametrize("output", ["logistics", "levels"])
def test_training_steps_lower_the_loss(output: str) -> None:
    model = small_model(channels=16, skip_channels=16, crop=0, output=output)
    (phase,) = model.phases()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, phase.betas)
    values = []
    for _ in range(40):
        loss = model.loss("sound", {"audio": waves(4, model)}, NOW)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[0] < math.log(256) + 0.5
    assert values[-1] < 0.5 * values[0]


def test_level_probabilities_of_a_mixture_sum_to_one_and_are_accurate_in_the_tails() -> None:
    """Also where its center is far away: there only quotients count, as in exp(-distance / scale)."""
    center = torch.tensor([[0.1, -0.4], [0.0, 5.0], [-0.9, 0.9]])
    log_scale = torch.tensor([[-2.0, -9.0], [-10.0, -8.0], [0.0, 3.0]])
    weight = torch.tensor([[0.0, 1.0], [0.0, -2.0], [5.0, 0.0]])
    log_prob = logistics_level_logits(center, log_scale, weight, level_borders())
    torch.testing.assert_close(log_prob.exp().sum(1), torch.ones(3))
    assert log_prob.isfinite().all()
    exact = logistics_level_logits(*(part.double() for part in (center, log_scale, weight, level_borders())))
    torch.testing.assert_close(log_prob.double(), exact, rtol=1e-3, atol=1e-2)
    low, high = level_borders()[:-1], level_borders()[1:]
    one_by_one = logistics_log_prob(*(part[:, None] for part in (center, log_scale, weight)), low, high)
    torch.testing.assert_close(log_prob, one_by_one)
    samples = inverse_mu_law(torch.arange(256))
    assert ((low < samples) & (samples < high)).all()


def test_a_center_is_predicted_from_the_samples_before_it() -> None:
    """With coefficients alone: twice the last one less the one before, that of a straight line."""
    model = small_model(components=1).double()
    added = torch.tensor([0.0, 0, 0, -1, 1]).double()  # to the last sample itself
    torch.testing.assert_close(model.cosines @ model.cosines.t(), torch.eye(5).double(), atol=1e-6, rtol=0)
    with torch.no_grad():
        model.numbers.weight.zero_()
        model.numbers.bias.copy_(torch.cat((10 * model.cosines @ added, torch.tensor([0.0, -9, 0]))))
    line = torch.linspace(0.1, 0.9, 40).expand(1, -1)
    levels = mu_law(line)
    samples_before = inverse_mu_law(levels).double()[0]
    expected = mu_law(2 * samples_before[1:-1] - samples_before[:-2])
    assert torch.equal(model(levels)[0, 2:].argmax(1), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cached_sampling_equals_full_forwards(variant: str, temperature: float) -> None:
    """Beyond the field, so that every ring is written more than once; every sample changes what follows."""
    model = small_model(**VARIANTS[variant]).double()
    for parameter in model.parameters():
        parameter.mul_(3).add_(torch.randn(parameter.shape, generator=seeded(4)), alpha=0.3)
    sampled = model.draw(3, SoundOptions(temperature=temperature), generator=seeded(5))
    assert isinstance(sampled, Sounds)
    assert sampled.sample_rate == 100
    generator = seeded(5)
    levels, labels = torch.zeros(3, 0, dtype=torch.int64), torch.arange(3)
    for _ in range(model.config.length):
        logits = model(F.pad(levels, (0, 1)), 1, labels)[:, 0]
        levels = torch.cat((levels, choose(logits, temperature, generator)[:, None]), 1)
    assert torch.equal(mu_law(sampled.waves), levels)
    assert len(levels.unique()) > 1


def test_seconds_set_the_length_of_a_sound() -> None:
    assert small_model().draw(1, SoundOptions(seconds=0.7)).waves.shape == (1, 70)


def test_predictors_start_as_those_of_harmonic_sounds() -> None:
    """Of all harmonics of a pitch between rate / reach and eight times that, to a few percent."""
    model = WaveNet(WaveNetConfig(predictors=64))
    time, errors = torch.arange(2000) / 8000, []
    for pitch in (125.0, 220.0, 391.0, 700.0):
        harmonic = torch.arange(1, int(4000 / pitch))[:, None]
        wave = (torch.sin(2 * math.pi * pitch * harmonic * time + harmonic) / harmonic).sum(0, keepdim=True)
        wave = 0.3 * wave / wave.abs().max()
        with torch.no_grad():
            guesses = model._guesses(model._before(wave, 2000))
        error = (guesses - wave[..., None])[0, 200:].square().mean(0).sqrt()
        nearest = round(63 * math.log(pitch / 100, 8))
        errors.append(float(error[nearest] / wave.square().mean().sqrt()))
    assert max(errors) < 0.35
    assert sum(errors) < 4 * 0.2
    last = (wave - model._before(wave, 2000)[..., -1])[0, 200:].square().mean().sqrt()
    assert float(last / wave.square().mean().sqrt()) > 0.5  # of predicting the sample before


def test_the_prediction_with_the_smallest_errors_decides() -> None:
    model = small_model(predictors=3, components=1)
    with torch.no_grad():
        model.numbers.weight.zero_()
        model.numbers.bias.zero_()
        model.predictors.copy_(torch.randn(3, 5, generator=seeded(6)))
    guesses, errors = torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([[1e-3, 1e-6, 1e-2]]).log()
    mean, log_scale, _ = model._mixture(model.numbers.bias[None], guesses, errors)
    torch.testing.assert_close(mean, torch.tensor([[0.2]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(log_scale, torch.tensor([[math.log(1e-3)]]), atol=1e-3, rtol=0)


def test_labels_decide_what_a_conditional_model_predicts_and_samples() -> None:
    model = small_model(classes=6, conditional=True, predictors=2)
    with torch.no_grad():
        model.label.weight.mul_(20)
        model.numbers.weight.mul_(20)
    levels = random_levels(2, 20)
    assert not torch.equal(*(model(levels, 5, torch.full((2,), label)) for label in (0, 1)))
    audio = waves(2, model)
    scores = [model.score({"audio": audio, "labels": torch.tensor(labels)})["nll"] for labels in ([0, 1], [1, 1])]
    assert scores[0][0] != scores[1][0]
    assert scores[0][1] == scores[1][1]
    same = model.draw(2, SoundOptions(label=3), generator=seeded(7)).waves
    found = [model._wanted(*wanted) for wanted in ((2, -1), (3, -1), (8, -1), (2, 3))]
    assert [each.tolist() for each in found if each is not None] == [
        [0, 3], [0, 2, 4], [0, 1, 2, 3, 4, 5, 0, 1], [3, 3]
    ]  # fmt: skip
    assert not torch.equal(model.draw(2, SoundOptions(), generator=seeded(7)).waves[0], same[0])
    with pytest.raises(ValueError, match=r"^label: expected -1 or a class below 6, got 6$"):
        model.draw(1, SoundOptions(label=6))
    with pytest.raises(ValueError, match=r"^labels: expected \(B,\) int64, got a batch without labels$"):
        model.score({"audio": audio})
    with pytest.raises(ValueError, match=r"^label: expected -1, as the model is not conditional, got 0$"):
        small_model().draw(1, SoundOptions(label=0))


def test_predictors_are_suggested_unless_levels_are_the_output() -> None:
    size = DataSize("audio", 100)
    assert WaveNet.suggested(size)["model.predictors"] == 192
    assert WaveNet.suggested(size, {"model.output": "levels"}) == {}
    assert WaveNetConfig().predictors == 0  # models that were saved before


@pytest.mark.parametrize("trained", [True, False])
def test_predictors_are_trained_only_where_the_option_says_so(trained: bool) -> None:
    model = small_model(predictors=3, trained_predictors=trained)
    model.loss("sound", {"audio": waves(2, model)}, NOW)["loss"].backward()
    assert (model.predictors.grad is not None) == trained
    assert all(weight.grad is not None for name, weight in model.named_parameters() if name != "predictors")


@pytest.mark.usefixtures("fresh_compiler")
def test_the_network_compiles_without_graph_breaks() -> None:
    model = small_model()
    levels = random_levels(2, 30)
    compiled = torch.compile(lambda x: model(x, 10), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(levels), model(levels, 10))


CONFIG_ERRORS = {
    "no channels": ({"channels": 0}, "channels: expected a positive integer, got 0"),
    "no sound": ({"length": 0}, "length: expected a positive integer, got 0"),
    "a long cycle": ({"cycle": 17}, "cycle: expected at most 16, dilations up to 32768, got 17"),
    "no reach": ({"reach": 0}, "reach: expected a positive integer, got 0"),
    "predictors of levels": (
        {"predictors": 3, "output": "levels"},
        "predictors: expected 0 with output 'levels', got 3",
    ),
    "conditional without classes": (
        {"conditional": True},
        "conditional: expected false, as the data has 0 classes, got true",
    ),
    "an onset of 2": ({"onset": 2.0}, "onset: expected a share from 0 to 1, got 2.0"),
    "an unknown output": ({"output": "bits"}, "output: expected one of logistics, levels, got 'bits'"),
    "a negative crop": ({"crop": -1}, "crop: expected an integer >= 0, got -1"),
    "a beta of 1": ({"beta1": 1.0}, r"beta1: expected a probability in \[0, 1\), got 1.0"),
    "a learning rate of 0": ({"learning_rate": 0.0}, "learning_rate: expected a positive number, got 0.0"),
}
OPTION_ERRORS = {
    "negative seconds": ({"seconds": -1.0}, "seconds: expected a finite number >= 0, got -1.0"),
    "temperature NaN": ({"temperature": math.nan}, "temperature: expected a finite number >= 0, got nan"),
}


@pytest.mark.parametrize("mistake", [*CONFIG_ERRORS, *OPTION_ERRORS])
def test_invalid_configs_and_sampling_options_raise_an_error_that_names_the_option(mistake: str) -> None:
    options, message = {**CONFIG_ERRORS, **OPTION_ERRORS}[mistake]
    with pytest.raises(ValueError, match=f"^{message}"):
        (WaveNetConfig if mistake in CONFIG_ERRORS else SoundOptions)(**options)  # type: ignore[arg-type]


CALL_ERRORS = {
    "floating levels": (
        lambda model: model(torch.zeros(2, 9)),
        TypeError,
        "levels: expected an int64 tensor, got torch.float32",
    ),
    "fewer levels than the length": (
        lambda model: model(random_levels(2, 5), 6),
        ValueError,
        r"levels: expected \(B, N\) with N at least length = 6, got \(2, 5\)",
    ),
    "whole numbers for audio": (
        lambda model: model.score({"audio": random_levels(2, 40)}),
        TypeError,
        "audio: expected a floating-point tensor, got torch.int64",
    ),
    "another length": (
        lambda model: model.score({"audio": torch.zeros(2, 41)}),
        ValueError,
        r"audio: expected shape \(B, length\) = \(2, 40\), got \(2, 41\)",
    ),
}


@pytest.mark.parametrize("mistake", CALL_ERRORS)
def test_invalid_arguments_raise_an_error_that_names_the_argument(mistake: str) -> None:
    call, error, message = CALL_ERRORS[mistake]
    with pytest.raises(error, match=f"^{message}"):
        call(small_model())


def test_rate_and_length_come_from_the_data() -> None:
    assert from_data(WaveNetConfig) == ["sample_rate", "length", "classes"]


def test_examples_in_docstrings_run() -> None:
    results = doctest.testmod(wavenet, extraglobs={"torch": torch})
    assert results.attempted
    assert results.failed == 0
