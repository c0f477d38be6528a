"""The image GANs besides the DCGAN: configs, losses and penalties, labels, sampling, torch.compile."""

from __future__ import annotations

import dataclasses
import doctest
import importlib

import pytest
import torch
from torch import Tensor

from fastgen.models import sagan
from fastgen.models.adversarial import ImageGAN
from fastgen.models.attention_gan import AttentionGAN
from fastgen.models.base import Images, StepContext, from_data
from fastgen.models.cdcgan import CDCGAN
from fastgen.models.cgan import CGAN
from fastgen.models.conditioning import LabelOptions
from fastgen.models.gan import GAN
from fastgen.models.sagan import SAGAN, SAGANConfig, recomputed_buffers
from fastgen.models.stylegan import StyleGAN
from fastgen.models.transgan import TransGAN

NOW = StepContext(1, 10)
CLASSES = 3

MODELS: dict[str, tuple[type[ImageGAN], dict[str, object]]] = {
    "sagan": (SAGAN, {"width": 8, "classes": CLASSES}),
    "sagan, no classes": (SAGAN, {"width": 8}),
    "sagan, unconditional": (SAGAN, {"width": 8, "classes": CLASSES, "conditional": False}),
    "cgan": (CGAN, {"width": 16, "depth": 2, "classes": CLASSES}),
    "cgan, projection": (CGAN, {"width": 16, "depth": 2, "classes": CLASSES, "projection": True}),
    "cdcgan": (CDCGAN, {"width": 4, "classes": CLASSES}),
    "cdcgan, projection": (CDCGAN, {"width": 4, "classes": CLASSES, "projection": True}),
    "gan": (GAN, {"width": 16, "depth": 2}),
    "gan, convolutional": (GAN, {"width": 16, "depth": 2, "discriminator": "convolutional", "convolution_width": 4}),
    "attention-gan": (AttentionGAN, {"width": 4, "gate_width": 4}),
    "attention-gan, strided": (
        AttentionGAN,
        {"width": 4, "gate_width": 4, "gate_stride": 2, "gate_each_channel": True},
    ),
    "stylegan": (StyleGAN, {"width": 8, "style_dim": 8, "style_mixing": 0.5}),
    "stylegan, residual": (
        StyleGAN,
        {"width": 8, "style_dim": 8, "output": "residual", "minibatch_std": False}
        | {"path_length_weight": 2.0, "path_length_every": 1},
    ),
    "transgan": (TransGAN, {"width": 8, "num_heads": 2, "generator_depth": 1, "penalty_every": 1}),
    "transgan, windows": (
        TransGAN,
        {"width": 8, "num_heads": 2, "window": 3, "patch_size": 2, "summary": "mean", "penalty_every": 1},
    ),
    "transgan, patches": (TransGAN, {"width": 8, "num_heads": 2, "generator_patch_size": 2, "penalty_every": 1}),
    "transgan, convolutions": (
        TransGAN,
        {"width": 8, "num_heads": 2, "generator_patch_size": 2, "convolutions": True, "penalty_every": 1},
    ),
    "transgan, convolutional discriminator": (
        TransGAN,
        {"width": 8, "num_heads": 2, "discriminator": "convolutional", "penalty_every": 1},
    ),
}
CONDITIONAL = [name for name in MODELS if "classes" in MODELS[name][1] and "unconditional" not in name]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_model(name: str, **options: object) -> ImageGAN:
    torch.manual_seed(0)
    model_class, small = MODELS[name]
    return model_class(model_class.config_class(**{"latent_dim": 8, **small, **options}))


def a_batch(model: ImageGAN, n: int = 8) -> dict[str, Tensor]:
    config = model.config
    images = torch.rand(n, config.channels, config.image_size, config.image_size, generator=seeded(1))
    return {"images": images, "labels": torch.arange(n) % CLASSES}


def step(model: ImageGAN, phase: str, batch: dict[str, Tensor], context: StepContext = NOW) -> dict[str, Tensor]:
    for other in model.phases():
        model.get_submodule(other.name).requires_grad_(other.name == phase)
    model.zero_grad()
    values = model.loss(phase, batch, context)
    values["loss"].backward()
    return values


def sampled(model: ImageGAN, n: int, seed: int = 7, **options: object) -> Tensor:
    return model.draw(n, model.sampling_class(**options), generator=seeded(seed)).pixels


def disturb(model: ImageGAN) -> None:
    """Adds noise to all weights, some of which are initialized to 0 (the gain of SAGAN's attention)."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=seeded(5)))


SIZES = {"cgan": [(5, 2), (9, 1)], "gan": [(5, 2), (9, 1)]}
"""Models of linear layers take any image size; the others 4 to 7 times a power of 2."""


@pytest.mark.parametrize("name", MODELS)
def test_shapes_of_odd_sizes(name: str) -> None:
    for size, channels in [*SIZES.get(name, [(20, 2), (10, 1)]), (8, 3)]:
        model = small_model(name, image_size=size, channels=channels)
        batch = a_batch(model, 3)
        labels = (batch["labels"],) if name in CONDITIONAL else ()
        assert model.discriminator(batch["images"], *labels).shape == (3,)
        assert model(torch.randn(3, 8), *labels).shape == batch["images"].shape
        pixels = sampled(model, 5)
        assert pixels.shape == (5, channels, size, size)
        assert pixels.min() >= 0
        assert pixels.max() <= 1


SIZE = r"image_size: expected at least 8, and 4 to 7 times a power of 2 \(8, 20, .*\), got 18"
CONFIG_ERRORS = {
    "sagan": ({"image_size": 18}, SIZE),
    "cdcgan": ({"image_size": 18}, SIZE),
    "attention-gan": ({"image_size": 18}, SIZE),
    "gan, convolutional": ({"image_size": 18}, SIZE),
    "stylegan": ({"image_size": 18}, SIZE),
    "transgan": ({"image_size": 18}, SIZE),
    "sagan: width": ({"width": 0}, "width: expected a positive integer, got 0"),
    "sagan: classes": ({"classes": -1}, "classes: expected an integer >= 0, got -1"),
    "sagan: attention": (
        {"image_size": 20, "attention_size": 4},
        "attention_size: expected at least 5, .*of 20, got 4",
    ),
    "cgan: classes": ({"classes": 0}, r"classes: expected 2 or more \(gan, dcgan and sagan .*\), got 0"),
    "cgan: one class": ({"classes": 1}, "classes: expected 2 or more .*, got 1"),
    "cgan: depth": ({"depth": 0}, "depth: expected a positive integer, got 0"),
    "cgan: embedding": ({"embedding_dim": 0}, "embedding_dim: expected a positive integer, got 0"),
    "cdcgan: classes": ({"classes": 0}, "classes: expected 2 or more .*, got 0"),
    "cdcgan: norm": (
        {"penalty": "gradient"},
        "discriminator_norm: expected layer or none with penalty gradient, .*got 'batch'",
    ),
    "gan: discriminator": (
        {"discriminator": "deep"},
        "discriminator: expected one of dense, convolutional, got 'deep'",
    ),
    "gan: width": ({"convolution_width": 0}, "convolution_width: expected a positive integer, got 0"),
    "gan: objective": ({"loss": "poker"}, "loss: expected one of minimax, .*, got 'poker'"),
    "stylegan: style": ({"style_dim": 0}, "style_dim: expected a positive integer, got 0"),
    "stylegan: output": ({"output": "sum"}, "output: expected one of skip, residual, got 'sum'"),
    "stylegan: rate": ({"mapping_rate": 0.0}, "mapping_rate: expected a positive number, got 0.0"),
    "stylegan: noise": ({"noise_rate": 0.0}, "noise_rate: expected a positive number, got 0.0"),
    "stylegan: mixing": ({"style_mixing": 2.0}, r"style_mixing: expected a probability in \[0, 1\], got 2.0"),
    "stylegan: path": ({"path_length_weight": -1.0}, "path_length_weight: expected a number >= 0, got -1.0"),
    "transgan: heads": ({"num_heads": 3}, "num_heads: expected a divisor of width, 8, got 3"),
    "transgan: patches": ({"patch_size": 4}, "patch_size: expected 1 or 2 for images of 8, got 4"),
    "transgan: generated patches": (
        {"generator_patch_size": 3},
        "generator_patch_size: expected 1 or 2 for images of 8, got 3",
    ),
    "transgan: summary": ({"summary": "all"}, "summary: expected one of token, mean, got 'all'"),
    "attention-gan: gate": ({"gate_stride": 0}, "gate_stride: expected a positive integer, got 0"),
}


@pytest.mark.parametrize("mistake", CONFIG_ERRORS)
def test_invalid_configs_raise_an_error_that_names_the_option(mistake: str) -> None:
    options, message = CONFIG_ERRORS[mistake]
    with pytest.raises(ValueError, match=f"^{message}"):
        small_model(mistake.split(":")[0], **options)


@pytest.mark.parametrize("name", CONDITIONAL)
def test_invalid_labels_raise_an_error(name: str) -> None:
    model = small_model(name)
    batch = a_batch(model)
    assert "classes" in from_data(model.config_class)
    with pytest.raises(ValueError, match=r"labels: expected \(B,\) int64, got a batch without labels"):
        model.loss("generator", {"images": batch["images"]}, NOW)
    with pytest.raises(TypeError, match=r"labels: expected an int64 tensor, got torch.float32"):
        model.loss("generator", batch | {"labels": torch.zeros(8)}, NOW)
    with pytest.raises(ValueError, match=r"labels: expected shape \(B,\) = \(8,\), got \(7,\)"):
        model.loss("generator", batch | {"labels": torch.zeros(7, dtype=torch.int64)}, NOW)
    with pytest.raises(ValueError, match="label: expected -1 or a class below 3, got 3"):
        model.draw(2, LabelOptions(label=3))
    with pytest.raises(ValueError, match=r"label: expected a class 0, 1, ... or -1 for all in turn, got -2"):
        LabelOptions(label=-2)


def test_a_label_for_an_unconditional_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="label: expected -1 for an unconditional model, got 0"):
        small_model("sagan, unconditional").draw(2, LabelOptions(label=0))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("penalty", ["r1", "dragan", "gradient"])
def test_the_gradient_of_a_penalty_matches_finite_differences(name: str, penalty: str) -> None:
    """In the discriminator's weights, along the gradient itself, in float64."""
    options: dict[str, object] = {"penalty": penalty, "penalty_weight": 10.0}
    if "discriminator_norm" in {f.name for f in dataclasses.fields(MODELS[name][0].config_class)}:
        options["discriminator_norm"] = "layer"
    model = small_model(name, **options).double()
    disturb(model)
    batch = {key: value.double() if value.is_floating_point() else value for key, value in a_batch(model).items()}
    for _ in range(20 if name.startswith("sagan") else 0):  # power iterations of the spectral norm converge
        step(model, "generator", batch)
    model.eval()

    def loss() -> Tensor:
        torch.manual_seed(3)
        return model.loss("discriminator", batch, NOW)["loss"]

    torch.manual_seed(3)
    assert step(model, "discriminator", batch)["penalty"] > 0
    weights = list(model.discriminator.parameters())
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in weights]
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    ends = []
    for sign in (1, -2):
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.add_(gradient, alpha=sign * 1e-6 / norm.item())
        ends.append(loss().item())
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-6, norm.item(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["sagan", "cgan", "cdcgan", "gan", "attention-gan", "stylegan", "transgan"])
def test_the_steps_of_each_phase_lower_its_loss_on_a_fixed_batch(name: str) -> None:
    model = small_model(name, penalty="none")
    batch = a_batch(model, 16)
    batch["images"] = (batch["images"] > 0.5).float()
    for phase in model.phases():
        optimizer = torch.optim.AdamW(model.get_submodule(phase.name).parameters(), lr=2e-3, betas=phase.betas)
        values = []
        for _ in range(20):
            torch.manual_seed(3)
            values.append(step(model, phase.name, batch)["loss"].item())
            optimizer.step()
        assert values[-1] < values[0] - 0.1


@pytest.mark.parametrize("name", CONDITIONAL)
def test_samples_have_one_class_per_column_or_the_requested_class(name: str) -> None:
    model = small_model(name)
    disturb(model)
    all_classes = model.draw(7, LabelOptions(), generator=seeded(0))
    assert all_classes.columns == CLASSES
    for label in range(CLASSES):
        one_class = model.draw(7, LabelOptions(label=label), generator=seeded(0))
        assert one_class.columns is None
        assert torch.equal(one_class.pixels[label::CLASSES], all_classes.pixels[label::CLASSES])
        assert not torch.equal(one_class.pixels[(label + 1) % CLASSES], all_classes.pixels[(label + 1) % CLASSES])


@pytest.mark.parametrize("name", ["cgan", "cdcgan, projection"])
def test_training_fits_the_images_of_each_class(name: str) -> None:
    """Two classes: black images and white images."""
    rates = {"generator_learning_rate": 2e-3, "discriminator_learning_rate": 2e-3}
    model = small_model(name, classes=2, penalty_weight=1.0, beta1=0.0, **rates)
    labels = torch.arange(16) % 2
    batch = {"images": labels.float().view(-1, 1, 1, 1).expand(-1, -1, 8, 8), "labels": labels}
    optimizers = {
        phase.name: torch.optim.AdamW(model.get_submodule(phase.name).parameters(), phase.learning_rate, phase.betas)
        for phase in model.phases()
    }
    for number in range(1, 101):
        for phase, optimizer in optimizers.items():
            torch.manual_seed(number)
            step(model, phase, batch)
            optimizer.step()
    black, white = (sampled(model, 8, label=label).mean().item() for label in (0, 1))
    assert white - black > 0.3
    assert white > 0.75


def test_settled_spectral_norms_are_1() -> None:
    """``recomputed_buffers`` recomputes the singular vectors: averaged ones do not belong to the averaged weights."""
    model = small_model("sagan")
    disturb(model)
    layers = [layer for layer in model.modules() if hasattr(layer, "parametrizations")]
    assert len(layers) == 21
    model.eval()

    def max_error() -> float:
        norms = [torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item() for layer in layers]
        return max(abs(norm - 1) for norm in norms)

    stale = max_error()
    with recomputed_buffers(model), torch.no_grad():
        assert max_error() < min(1e-3, stale / 3)
    assert max_error() == stale


def test_without_a_bias_of_the_coarse_map_samples_of_a_class_differ():
    """Images of 28 and more pixels take this default: as large a bias as training reached made all samples one."""
    assert not any(size.model.get("canvas_bias", True) for size in SAGAN.sizes.values())
    spread = {}
    for canvas_bias in (True, False):
        torch.manual_seed(0)
        generator = small_model("sagan", canvas_bias=canvas_bias).generator
        assert (generator.canvas[0].bias is not None) == canvas_bias
        for parameter in generator.canvas[0].parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, std=20.0)
        spread[canvas_bias] = generator(torch.randn(32, 8), torch.zeros(32, dtype=torch.long)).std(0).mean().item()
    assert spread[False] > 3 * spread[True]


def test_attention_is_at_the_configured_size_and_initially_the_identity() -> None:
    for options, at in (
        ({"image_size": 64}, 16),
        ({"image_size": 20}, 10),
        ({"image_size": 8, "attention_size": 4}, 4),
    ):
        assert SAGANConfig(**options).attention_at == at
        model = small_model("sagan", **options)
        calls: list[tuple[torch.Size, bool]] = []

        def hook(layer: object, x: tuple[Tensor], y: Tensor, calls: list[tuple[torch.Size, bool]] = calls) -> None:
            calls.append((x[0].shape[2:], torch.equal(x[0], y)))

        for network in model.children():
            layers = [layer for layer in network.modules() if isinstance(layer, sagan.SelfAttention2d)]
            assert len(layers) == 1
            layers[0].register_forward_hook(hook)
        model.loss("generator", a_batch(model, 2), NOW)
        assert calls == [((at, at), True)] * 2


def test_attention_maps_are_visualized_below_their_samples() -> None:
    model = small_model("attention-gan", image_size=10, channels=3)
    batch = a_batch(model)
    rows = model.visualize(batch, generator=seeded(7))["gates"]
    assert isinstance(rows, Images)
    samples, maps = rows.pixels.unflatten(0, (-1, 2, rows.columns)).unbind(1)
    torch.testing.assert_close(samples.flatten(0, 1), sampled(model, len(batch["images"])))
    assert ((maps > 0) & (maps < 1)).all()


@pytest.mark.parametrize("name", ["gan", "cgan", "cdcgan", "sagan", "attention_gan", "stylegan", "transgan"])
def test_examples_in_docstrings_run(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"fastgen.models.{name}"), extraglobs={"torch": torch})
    assert results.attempted
    assert results.failed == 0
