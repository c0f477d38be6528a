"""The DCGAN: config, losses and penalties, phases, sampling."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import Tensor, nn

from fastgen import losses
from fastgen.models import dcgan
from fastgen.models.base import Images, NoOptions, StepContext, from_data
from fastgen.models.dcgan import DCGAN, DCGANConfig

NOW = StepContext(1, 10)


def small_model(**options: object) -> DCGAN:
    torch.manual_seed(0)
    return DCGAN(DCGANConfig(**{"width": 4, "latent_dim": 8, **options}))  # type: ignore[arg-type]


def random_images(n: int, config: DCGANConfig) -> Tensor:
    return torch.rand(n, config.channels, config.image_size, config.image_size, generator=seeded(1))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def train_only(model: DCGAN, phase: str) -> None:
    """Freezes the other phases' networks, as the trainer does."""
    for other in model.phases():
        for name in other.networks:
            model.get_submodule(name).requires_grad_(other.name == phase)


def step(model: DCGAN, phase: str, images: Tensor, context: StepContext = NOW) -> dict[str, Tensor]:
    train_only(model, phase)
    model.zero_grad()
    values = model.loss(phase, {"images": images}, context)
    values["loss"].backward()
    return values


@pytest.mark.parametrize("size", [8, 10, 12, 14, 20, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_of_every_size(size: int, channels: int) -> None:
    model = small_model(image_size=size, channels=channels)
    images = random_images(3, model.config)
    assert model.discriminator(images).shape == (3,)
    samples = model.draw(3, NoOptions())
    assert isinstance(samples, Images)
    assert samples.pixels.shape == images.shape
    assert samples.pixels.min() >= 0
    assert samples.pixels.max() <= 1
    assert model(torch.randn(3, 8)).shape == images.shape
    assert torch.isfinite(model.loss("generator", {"images": images}, NOW)["loss"])


def test_networks_match_the_paper() -> None:
    model = small_model(image_size=64, channels=3, width=16)
    widths = [m.out_channels for m in model.generator if isinstance(m, nn.ConvTranspose2d)]
    assert widths == [128, 64, 32, 16, 3]
    widths = [m.out_channels for m in model.discriminator if isinstance(m, nn.Conv2d)]
    assert widths == [16, 32, 64, 128, 1]
    norms = [[type(m) for m in network].count(nn.BatchNorm2d) for network in model.children()]
    assert norms == [4, 3]  # none in the generator's last layer, none in the discriminator's first
    assert isinstance(model.generator[-1], nn.Tanh)
    assert {m.negative_slope for m in model.discriminator if isinstance(m, nn.LeakyReLU)} == {0.2}
    weights = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))])
    torch.testing.assert_close(weights.std().item(), 0.02, rtol=0.01, atol=0)


CONFIG_ERRORS = {
    "no size": ({"image_size": 0}, "image_size: expected a positive integer, got 0"),
    "a small size": ({"image_size": 4}, r"image_size: expected at least 8, .*got 4"),
    "an odd size": ({"image_size": 30}, r"image_size: expected .* times a power of 2 \(8, 20, .*\), got 30"),
    "no channels": ({"channels": 0}, "channels: expected a positive integer, got 0"),
    "a width of True": ({"width": True}, "width: expected a positive integer, got True"),
    "no critic steps": ({"critic_steps": 0}, "critic_steps: expected a positive integer, got 0"),
    "an interval of 0": ({"penalty_every": 0}, "penalty_every: expected a positive integer, got 0"),
    "an unknown objective": ({"loss": "poker"}, "loss: expected one of minimax, .*, got 'poker'"),
    "an unknown penalty": ({"penalty": "r3"}, "penalty: expected one of none, r1, gradient, dragan, got 'r3'"),
    "an unknown norm": ({"discriminator_norm": "group"}, "discriminator_norm: expected one of batch, .*got 'group'"),
    "batch norm with a per-sample penalty": (
        {"penalty": "gradient"},
        "discriminator_norm: expected layer or none with penalty gradient, .*got 'batch'",
    ),
    "a negative weight": ({"penalty_weight": -1.0}, "penalty_weight: expected a number >= 0, got -1.0"),
    "a learning rate of 0": (
        {"generator_learning_rate": 0.0},
        "generator_learning_rate: expected a positive number, got 0.0",
    ),
    "a beta of 1": ({"beta1": 1.0}, r"beta1: expected a probability in \[0, 1\), got 1.0"),
}


@pytest.mark.parametrize("mistake", CONFIG_ERRORS)
def test_invalid_configs_raise_an_error_that_names_the_option(mistake: str) -> None:
    options, message = CONFIG_ERRORS[mistake]
    with pytest.raises(ValueError, match=f"^{message}"):
        DCGANConfig(**options)  # type: ignore[arg-type]


def test_image_size_and_channels_come_from_the_data() -> None:
    assert from_data(DCGANConfig) == ["image_size", "channels"]


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (None, TypeError, "images: expected a tensor, got NoneType"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), TypeError, "images: expected a floating-point tensor"),
        (torch.zeros(2, 3, 8, 8), ValueError, r"images: expected shape \(B, C, S, S\) = \(2, 1, 8, 8\), got"),
    ],
    ids=["none", "bytes", "colors"],
)
def test_invalid_images_raise_an_error(images: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_model().loss("discriminator", {"images": images}, NOW)


def test_phases_update_the_discriminator_before_the_generator() -> None:
    model = small_model(critic_steps=5, generator_learning_rate=1e-3)
    first, second = model.phases()
    assert (first.name, first.networks, first.repeats) == ("discriminator", ("discriminator",), 5)
    assert (second.name, second.networks, second.repeats) == ("generator", ("generator",), 1)
    assert (first.learning_rate, second.learning_rate) == (DCGANConfig.discriminator_learning_rate, 1e-3)
    assert model.averaged == ("generator",)


PENALTIES = {
    "r1": {"penalty": "r1"},
    "dragan": {"penalty": "dragan"},
    "gradient": {"penalty": "gradient", "discriminator_norm": "layer", "loss": "wasserstein"},
    "gradient, no norm": {"penalty": "gradient", "discriminator_norm": "none"},
}


@pytest.mark.parametrize("case", PENALTIES)
def test_a_penalty_adds_its_weight_times_itself_and_has_a_gradient(case: str) -> None:
    model = small_model(**PENALTIES[case], penalty_weight=3.0)
    images = random_images(8, model.config)
    torch.manual_seed(2)
    values = step(model, "discriminator", images)
    gradients = [p.grad.clone() for p in model.discriminator.parameters() if p.grad is not None]
    plain = small_model(**{**PENALTIES[case], "penalty": "none"})
    torch.manual_seed(2)
    without = step(plain, "discriminator", images)
    assert "penalty" not in without
    assert values["penalty"] > 0
    torch.testing.assert_close(values["loss"], without["loss"] + 3 * values["penalty"])
    others = [p.grad for p in plain.discriminator.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(gradients, others, strict=True) if b is not None)


@pytest.mark.parametrize("case", PENALTIES)
def test_the_penalty_uses_the_grad_scaler_and_has_the_same_value(case: str) -> None:
    model = small_model(**PENALTIES[case])
    images = random_images(8, model.config)
    calls = []

    class Scaler(torch.amp.GradScaler):
        def scale(self, outputs):
            calls.append(outputs)
            return super().scale(outputs)

    penalties = []
    for scaler in (None, Scaler("cpu")):
        torch.manual_seed(2)
        penalties.append(model.loss("discriminator", {"images": images}, StepContext(1, 10, scaler))["penalty"])
    torch.testing.assert_close(*penalties)
    assert len(calls) == 1


def test_the_r1_penalty_is_computed_on_the_batch_of_real_images() -> None:
    model = small_model(penalty="r1")
    images = random_images(8, model.config)
    real = (2 * images - 1).requires_grad_()
    wanted = losses.r1_penalty(model.discriminator(real), real)
    torch.testing.assert_close(step(model, "discriminator", images)["penalty"], wanted.detach())


def test_a_lazy_penalty_is_multiplied_by_its_interval() -> None:
    eager, lazy = small_model(penalty_every=1), small_model(penalty_every=4)
    images = random_images(8, eager.config)
    for number in range(1, 9):
        values = []
        for model in (eager, lazy):
            torch.manual_seed(number)
            values.append(model.loss("discriminator", {"images": images}, StepContext(number, 8)))
        assert ("penalty" in values[1]) == (number % 4 == 0)
        if number % 4 == 0:
            torch.testing.assert_close(values[1]["penalty"], 4 * values[0]["penalty"])


def test_the_steps_of_each_phase_lower_its_loss_on_a_fixed_batch() -> None:
    model = small_model(width=16, penalty_weight=0.1)
    images = (random_images(1, model.config) > 0.5).float().expand(16, -1, -1, -1)
    for phase in model.phases():
        optimizer = torch.optim.AdamW(model.get_submodule(phase.name).parameters(), lr=2e-3, betas=phase.betas)
        values = []
        for _ in range(20):
            torch.manual_seed(3)
            values.append(step(model, phase.name, images)["loss"].item())
            optimizer.step()
        assert values[-1] < 0.7 * values[0]


def test_training_both_networks_fits_a_data_set_of_one_image() -> None:
    model = small_model(width=16, generator_learning_rate=2e-3, discriminator_learning_rate=2e-3)
    images = (random_images(1, model.config) > 0.5).float().expand(16, -1, -1, -1)
    optimizers = {
        p.name: torch.optim.AdamW(model.get_submodule(p.name).parameters(), p.learning_rate, p.betas)
        for p in model.phases()
    }

    def error() -> float:
        return (model.draw(16, NoOptions(), generator=seeded(0)).pixels - images[:1]).abs().mean().item()

    before = error()
    for _ in range(100):
        for phase, optimizer in optimizers.items():
            step(model, phase, images)
            optimizer.step()
    assert before > 0.4
    assert error() < 0.2


def test_examples_in_docstrings_run() -> None:
    results = doctest.testmod(dcgan, extraglobs={"torch": torch})
    assert results.attempted
    assert results.failed == 0
