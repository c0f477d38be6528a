"""CycleGAN and Pix2Pix."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from torch import Tensor

from fastgen import metrics
from fastgen.data import DataConfig
from fastgen.models import (
    CycleGAN,
    CycleGANConfig,
    GenerativeModel,
    Images,
    NoOptions,
    Pix2Pix,
    Pix2PixConfig,
    StepContext,
)
from fastgen.models.cyclegan import DirectionOptions, History
from fastgen.models.pix2pix import PatchDiscriminator

NOW = StepContext(1, 10)
SMALL: dict[str, tuple[type[GenerativeModel], dict[str, object]]] = {
    "cyclegan": (
        CycleGAN,
        {
            "image_size": 16,
            "width": 4,
            "num_downsamples": 2,
            "blocks": 1,
            "patch_width": 4,
            "history": 6,
            "identity_weight": 1.0,
        },
    ),
    "cyclegan, no identity": (
        CycleGAN,
        {"image_size": 16, "width": 4, "blocks": 1, "patch_width": 4, "identity_weight": 0.0, "history": 0},
    ),
    "pix2pix": (Pix2Pix, {"image_size": 16, "width": 4, "num_downsamples": 3, "patch_width": 4}),
    "pix2pix, instance": (
        Pix2Pix,
        {
            "image_size": 16,
            "width": 4,
            "num_downsamples": 3,
            "patch_width": 4,
            "norm": "instance",
            "dropout": 0.0,
            "patch_norm": "instance",
        },
    ),
}
BOTH = ("cyclegan", "pix2pix")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_model(name: str, **options: object) -> GenerativeModel:
    torch.manual_seed(0)
    model_class, small = SMALL[name]
    return model_class(model_class.config_class(**{**small, **options}))


def a_batch(model: GenerativeModel, n: int = 4) -> dict[str, Tensor]:
    config, size = model.config, model.config.image_size
    channels = {"a": config.channels, "b": config.channels}
    if isinstance(model, Pix2Pix):
        channels = {"inputs": config.input_channels, "targets": config.channels}
    return {
        name: torch.rand(n, count, size, size, generator=seeded(i)) ** (1 + i)
        for i, (name, count) in enumerate(channels.items())
    }


def step(model: GenerativeModel, phase: str, batch: dict[str, Tensor], context: StepContext = NOW) -> dict[str, Tensor]:
    for each in model.phases():
        for network in each.networks:
            model.get_submodule(network).requires_grad_(each.name == phase)
    model.zero_grad()
    values = model.loss(phase, batch, context)
    values["loss"].backward()
    return values


def translated(model: GenerativeModel, batch: dict[str, Tensor], seed: int = 7, **options: object) -> Tensor:
    return model.translate(batch, model.sampling_class(**options), generator=seeded(seed)).pixels


SIZES = {
    "cyclegan": [
        {"image_size": 12},
        {"image_size": 20, "channels": 3, "patch_num_downsamples": 1},
        {"num_downsamples": 1},
    ],
    "pix2pix": [{"image_size": 24}, {"image_size": 8, "patch_num_downsamples": 1, "channels": 2, "input_channels": 5}],
}


@pytest.mark.parametrize("name", BOTH)
def test_shapes_of_odd_sizes_and_channels(name: str) -> None:
    for options in SIZES[name]:
        model = small_model(name, **options)
        batch = a_batch(model, 3)
        pixels = translated(model, batch)
        assert pixels.shape == (3, model.config.channels, model.config.image_size, model.config.image_size)
        assert 0 <= pixels.min() < pixels.max() <= 1
        scores = model.score(batch)
        assert all(score.shape == (3,) and (score > 0).all() for score in scores.values())
        for phase in model.phases():
            step(model, phase.name, batch)


CONFIG_ERRORS = {
    "cyclegan: size": ({"image_size": 18}, "image_size: expected a multiple of 4, as num_downsamples = 2, got 18"),
    "cyclegan: small": (
        {"image_size": 8},
        "image_size: expected at least 12, as patch_num_downsamples = 2, got 8",
    ),
    "cyclegan: coarse": (
        {"image_size": 16, "num_downsamples": 4},
        "image_size: expected at least 32, as num_downsamples = 4, got 16",
    ),
    "cyclegan: blocks": ({"blocks": -1}, "blocks: expected an integer >= 0, got -1"),
    "cyclegan: history": ({"history": 2.5}, "history: expected an integer >= 0, got 2.5"),
    "cyclegan: cycle": ({"cycle_weight": -1.0}, "cycle_weight: expected a number >= 0, got -1.0"),
    "cyclegan: identity": ({"identity_weight": float("inf")}, "identity_weight: expected a number >= 0, got inf"),
    "cyclegan: loss": ({"loss": "huber"}, "loss: expected one of minimax, .*, got 'huber'"),
    "cyclegan: width": ({"width": 0}, "width: expected a positive integer, got 0"),
    "pix2pix: size": ({"image_size": 20}, "image_size: expected a multiple of 8, as num_downsamples = 3, got 20"),
    "pix2pix: norm": ({"norm": "layer"}, "norm: expected one of batch, instance, got 'layer'"),
    "pix2pix: dropout": ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
    "pix2pix: l1": ({"l1_weight": -1.0}, "l1_weight: expected a number >= 0, got -1.0"),
    "pix2pix: inputs": ({"input_channels": 0}, "input_channels: expected a positive integer, got 0"),
    "pix2pix: patch norm": ({"patch_norm": "batch"}, "patch_norm: expected one of instance, none, got 'batch'"),
    "pix2pix: patches": ({"patch_width": 0}, "patch_width: expected a positive integer, got 0"),
}


@pytest.mark.parametrize("mistake", CONFIG_ERRORS)
def test_invalid_configs_raise_an_error_that_names_the_option(mistake: str) -> None:
    options, message = CONFIG_ERRORS[mistake]
    with pytest.raises(ValueError, match=f"^{message}"):
        small_model(mistake.split(":")[0], **options)


def test_directions_have_two_spellings_and_options_of_a_translation_a_default() -> None:
    torch.manual_seed(0)
    model = CycleGAN(CycleGANConfig(image_size=16, width=4, blocks=1, patch_width=4)).eval()
    images = torch.rand(2, 1, 16, 16)
    for spelling, other in (("AtoB", "a-to-b"), ("BtoA", "b-to-a")):
        assert DirectionOptions(spelling) == DirectionOptions(other)
        assert DataConfig(direction=other) == DataConfig(direction=spelling)
        assert torch.equal(model(images, spelling), model(images, other))
    batch = {"a": images, "b": images}
    assert torch.equal(model.translate(batch).pixels, model.translate(batch, DirectionOptions("a-to-b")).pixels)
    pairs = Pix2Pix(Pix2PixConfig(image_size=16, width=4, patch_width=4)).eval()
    drawn = [
        pairs.translate({"inputs": images}, *options, generator=torch.Generator().manual_seed(0)).pixels
        for options in ((), (NoOptions(),))
    ]
    assert torch.equal(*drawn)


def test_invalid_images_and_directions_raise_an_error() -> None:
    model = small_model("cyclegan")
    with pytest.raises(ValueError, match=r"b: expected shape \(B, C, S, S\) = \(4, 1, 16, 16\), got \(4, 1, 15, 16\)"):
        model.loss("generator", a_batch(model) | {"b": torch.rand(4, 1, 15, 16)}, NOW)
    with pytest.raises(TypeError, match=r"inputs: expected a floating-point tensor, got torch.uint8"):
        small_model("pix2pix").translate({"inputs": torch.zeros(1, 1, 16, 16, dtype=torch.uint8)}, None)
    with pytest.raises(ValueError, match="direction: expected one of AtoB, BtoA, a-to-b, b-to-a, got 'a-to-c'"):
        DirectionOptions("a-to-c")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("penalty", ["r1", "dragan", "gradient"])
def test_the_gradient_of_the_penalty_matches_finite_differences(name: str, penalty: str) -> None:
    """Along the gradient itself, in float64. The penalty is computed in its own steps only."""
    options = {"penalty": penalty, "penalty_weight": 10.0, "penalty_every": 2, "loss": "wasserstein"}
    if name == "cyclegan":
        options["history"] = 0
    model = small_model(name, **options).double()
    with torch.no_grad():  # larger weights, as after training: gradients jump where features are 0
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=seeded(5)))
    batch = {key: value.double() for key, value in a_batch(model).items()}
    now = StepContext(2, 10)
    assert "penalty" not in step(model, "discriminator", batch)

    def loss() -> float:
        torch.manual_seed(3)
        return model.loss("discriminator", batch, now)["loss"].item()

    torch.manual_seed(3)
    assert step(model, "discriminator", batch, now)["penalty"] > 0
    weights = [w for network in model.phases()[0].networks for w in model.get_submodule(network).parameters()]
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in weights]
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt().item()
    ends = []
    for sign in (1, -2):
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.add_(gradient, alpha=sign * 1e-6 / norm)
        ends.append(loss())
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("name", BOTH)
def test_each_phase_lowers_its_loss_on_a_fixed_batch(name: str) -> None:
    model = small_model(name, **({"history": 0} if name == "cyclegan" else {}))
    batch = a_batch(model)
    for phase in model.phases():
        weights = [w for network in phase.networks for w in model.get_submodule(network).parameters()]
        optimizer = torch.optim.AdamW(weights, lr=2e-3, betas=phase.betas)
        values = []
        for _ in range(25):
            torch.manual_seed(3)
            values.append(step(model, phase.name, batch)["loss"].item())
            optimizer.step()
        assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize("name", BOTH)
def test_translations_are_independent_of_the_batch_and_change_no_state(name: str) -> None:
    model = small_model(name)
    for phase in model.phases():
        step(model, phase.name, a_batch(model))  # updates statistics and histories
    batch, before = a_batch(model), {key: value.clone() for key, value in model.state_dict().items()}
    first_alone = translated(model, {key: value[:1] for key, value in batch.items()})
    torch.testing.assert_close(first_alone, translated(model, batch)[:1])
    shown = model.visualize(batch, generator=seeded(0))
    assert all(isinstance(each, Images) and each.columns == 4 for each in shown.values())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_forward_translates_with_gradients() -> None:
    cyclegan, pix2pix = small_model("cyclegan"), small_model("pix2pix").eval()
    a = a_batch(cyclegan)["a"]
    for direction in ("a-to-b", "b-to-a"):
        images = cyclegan(a, direction)
        assert torch.equal(images, translated(cyclegan, {direction[0]: a}, direction=direction))
        images.sum().backward()
    inputs = a_batch(pix2pix)["inputs"]
    images = pix2pix(inputs, generator=seeded(7))
    assert torch.equal(images, translated(pix2pix, {"inputs": inputs}))
    images.sum().backward()
    for model in (cyclegan, pix2pix):
        assert all(p.grad is not None for name in model.averaged for p in model.get_submodule(name).parameters())
    with pytest.raises(ValueError, match="direction: expected one of AtoB, BtoA, a-to-b, b-to-a, got 'c'"):
        cyclegan(a, "c")


def test_visualize_returns_images_translations_and_cycles() -> None:
    model = small_model("cyclegan").eval()
    batch = a_batch(model)
    a, there, back = model.visualize(batch)["a-b-a"].pixels.split(4)
    torch.testing.assert_close(a, batch["a"])
    torch.testing.assert_close(there, translated(model, {"a": batch["a"]}, direction="a-to-b"))
    torch.testing.assert_close(back, translated(model, {"b": there}, direction="b-to-a"))
    cycle_a = (back - a).abs().flatten(1).mean(1)
    b, _, back = model.visualize(batch)["b-a-b"].pixels.split(4)
    expected = (cycle_a + (back - b).abs().flatten(1).mean(1)) / 2
    torch.testing.assert_close(model.score(batch)["cycle error"], expected)


def test_a_score_has_the_documented_receptive_field() -> None:
    for n, pixels in ((1, 16), (2, 34), (3, 70)):
        layers = PatchDiscriminator(CycleGANConfig(image_size=128, patch_num_downsamples=n, patch_width=2), 1)
        image = torch.rand(1, 1, 128, 128, requires_grad=True)
        scores = layers(image)
        assert scores.shape == (1, (128 >> n) - 2, (128 >> n) - 2)
        middle = scores.size(1) // 2
        (gradient,) = torch.autograd.grad(scores[0, middle, middle], image)
        rows = gradient[0, 0].abs().sum(1).nonzero()
        assert int(rows[-1] - rows[0]) + 1 == pixels


def test_a_history_fills_and_then_returns_stored_images_half_of_the_time() -> None:
    """Each image has a number: every image is returned or stored, and none is duplicated."""
    torch.manual_seed(0)
    history = History(20, (1, 1, 1))
    given = torch.arange(1.0, 401.0).view(-1, 8, 1, 1, 1)
    old = []
    returned: list[float] = []
    for batch in given:
        full = bool(history.filled.all())
        out = history.exchange(batch)
        differs = (out != batch).flatten()
        old += differs.tolist() if full else []
        returned += out.flatten().tolist()
    assert history.filled.all()
    assert abs(sum(old) / len(old) - 0.5) < 0.1
    kept = history.images.flatten().tolist()
    assert len(set(kept)) == 20
    assert set(returned) | set(kept) == set(given.flatten().tolist())
    assert max(returned.count(number) for number in returned) <= 2  # when it was new into an empty place, and once more
    assert torch.equal(History(0, (1, 1, 1)).exchange(given[0]), given[0])
    small = History(3, (1, 1, 1))
    for batch in given:
        out = small.exchange(batch)
        assert torch.equal(out[3:], batch[3:])
    assert small.filled.all()


def test_histories_are_part_of_the_state_dict() -> None:
    """A step depends on nothing but the state dict, the batch and the random state."""
    model = small_model("cyclegan")
    torch.manual_seed(1)
    for _ in range(3):
        step(model, "discriminator", a_batch(model))
    other = small_model("cyclegan")
    other.load_state_dict(model.state_dict())
    losses = []
    for each in (model, other):
        torch.manual_seed(5)
        losses.append([step(each, "discriminator", a_batch(each, 6))["loss"].item() for _ in range(2)])
    assert losses[0] == losses[1]
    assert model.history_a.filled.all()


def test_pix2pix_is_initialized_near_the_identity() -> None:
    for inputs, outputs in ((1, 3), (3, 3), (3, 1)):
        model = small_model("pix2pix", input_channels=inputs, channels=outputs, dropout=0.0)
        images = torch.rand(4, inputs, 16, 16, generator=seeded(1))
        expected = images if inputs == outputs else images.mean(1, keepdim=True).expand(-1, outputs, -1, -1)
        found = translated(model, {"inputs": images})
        expected = 0.5 * torch.tanh(2 * expected - 1) + 0.5
        assert (found - expected).abs().mean() < 0.25 * (expected - 0.5).abs().mean()


def test_pix2pix_learns_to_invert_images() -> None:
    model = small_model("pix2pix", channels=1, l1_weight=10.0, generator_learning_rate=5e-3)
    inputs = (
        (torch.rand(16, 1, 2, 2, generator=seeded(0)) > 0.5).float().repeat_interleave(8, 2).repeat_interleave(8, 3)
    )
    batch = {"inputs": inputs, "targets": 1 - inputs}
    before = model.score(batch, generator=seeded(0))["l1"].mean().item()
    optimizers = {
        phase.name: torch.optim.AdamW(model.get_submodule(phase.name).parameters(), phase.learning_rate, phase.betas)
        for phase in model.phases()
    }
    for number in range(1, 41):
        for phase, optimizer in optimizers.items():
            torch.manual_seed(number)
            step(model, phase, batch)
            optimizer.step()
    assert model.score(batch, generator=seeded(0))["l1"].mean().item() < 0.4 * before


def test_structural_similarity_matches_scikit_image() -> None:
    peer = pytest.importorskip("skimage.metrics").structural_similarity
    images, noise = (torch.rand(3, 2, 24, 20, generator=seeded(i)) for i in range(2))
    others = 0.7 * images + 0.3 * noise
    options = {"data_range": 1.0, "channel_axis": 0, "gaussian_weights": True, "use_sample_covariance": False}
    expected = [peer(*pair, **options) for pair in zip(images.double().numpy(), others.double().numpy(), strict=True)]
    torch.testing.assert_close(metrics.structural_similarity(images, others), torch.tensor(expected).double())
    torch.testing.assert_close(metrics.structural_similarity(images, images), torch.ones(3, dtype=torch.float64))
    assert metrics.structural_similarity(images[:, :, :4, :4], others[:, :, :4, :4]).shape == (3,)


def test_metrics_of_pairs_have_the_untranslated_input_as_baseline() -> None:
    targets = torch.rand(20, 3, 16, 16, generator=seeded(0))
    outputs, inputs = (targets + 0.01).clamp(0, 1), targets.mean(1, keepdim=True)
    space = metrics.FeatureSpace("means", 3, torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten()))
    found = {f.name: f for f in metrics.evaluate_pairs(outputs, targets, inputs, space, training=targets, resamples=0)}
    error = (inputs - targets).abs().mean().item()
    assert found["absolute error"].value == pytest.approx(0.01, rel=0.01)
    assert found["absolute error, input as it is"].value == pytest.approx(error, rel=1e-5)
    assert found["peak signal-to-noise ratio"].value == pytest.approx(40, abs=0.1)
    assert found["peak signal-to-noise ratio"].unit == "dB"
    assert found["structural similarity"].value > 0.99 > found["structural similarity, input as it is"].value
    distances = [found[f"Frechet distance, {name}"].value for name in ("targets", "targets, not translated")]
    assert distances[0] < distances[1]
    assert found["Frechet distance, real against real, targets"].value == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match=r"outputs: expected the shape of targets \(20, 3, 16, 16\), got \(20, 1"):
        metrics.evaluate_pairs(inputs, targets, inputs)


def test_metrics_of_domains_have_untranslated_images_as_baseline() -> None:
    dark, light = (torch.rand(60, 1, 8, 8, generator=seeded(i)) / 3 + i / 2 for i in range(2))
    space = metrics.classifier_features(
        torch.cat([dark, light]), torch.arange(2).repeat_interleave(60), dims=4, steps=30
    )
    options = {"name": "a to b", "training": light, "label": 1, "resamples": 0}
    figures = metrics.evaluate_domains(light[:30], light[30:], dark[30:], space, **options)
    found = {figure.name: figure.value for figure in figures}
    assert found["Frechet distance, a to b"] < 0.5 * found["Frechet distance, a to b, not translated"]
    assert found["class agreement, a to b"] == 1
    assert found["class agreement, a to b, not translated"] == 0
    assert len(figures) == 5


@pytest.mark.parametrize("name", BOTH)
def test_examples_in_docstrings_run(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"fastgen.models.{name}"), extraglobs={"torch": torch})
    assert results.attempted
    assert results.failed == 0
