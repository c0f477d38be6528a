"""Augmentation: what each transformation does, gradients and gradient penalties through it, adaptive augmentation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.models import MODELS, StepContext
from fastgen.models.adversarial import ImageGAN
from fastgen.models.augmentation import TRANSFORMATIONS, Augmentation, augment, augment_batch, parse_augment

GANS = sorted(name for name, model in MODELS.items() if issubclass(model, ImageGAN))
ALL = tuple(TRANSFORMATIONS)


def small(name: str, **options: Any) -> ImageGAN:
    model = MODELS[name]
    fields = {field.name for field in dataclasses.fields(model.config_class)}
    sizes = {
        "discriminator_norm": "none",
        "image_size": 8,
        "width": 8,
        "latent_dim": 8,
        "depth": 1,
        "classes": 2,
        "num_heads": 1,
        "head_dim": 8,
    }
    torch.manual_seed(0)
    config = model.config_class(**{n: v for n, v in sizes.items() if n in fields}, **options)
    made = model(config)
    assert isinstance(made, ImageGAN)
    return made


def batch(n: int = 8) -> dict[str, Tensor]:
    return {"images": torch.rand(n, 1, 8, 8), "labels": torch.arange(n) % 2}


def test_every_image_gan_has_the_option() -> None:
    assert {"gan", "dcgan", "cgan", "cdcgan", "sagan", "attention-gan", "stylegan", "transgan"} <= {*GANS}


def test_flips_keep_or_mirror_each_image() -> None:
    images = torch.rand(200, 3, 5, 5)
    out = augment(images, ("flip",))
    mirrored = (out == images.flip(-1)).all(dim=(1, 2, 3))
    assert ((out == images).all(dim=(1, 2, 3)) | mirrored).all()
    assert 60 < mirrored.sum() < 140


def test_translations_shift_by_up_to_an_eighth_and_fill_with_gray() -> None:
    images = torch.rand(300, 2, 16, 16) + 1
    found = set()
    for before, after in zip(images, augment(images, ("translation",)), strict=True):
        fits = []
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                expected = torch.zeros_like(before)
                ys, xs = (slice(max(0, d), 16 + min(0, d)) for d in (dy, dx))
                yt, xt = (slice(max(0, -d), 16 + min(0, -d)) for d in (dy, dx))
                expected[:, ys, xs] = before[:, yt, xt]
                fits += [(dy, dx)] if torch.equal(expected, after) else []
        assert len(fits) == 1
        found.add(fits[0])
    assert len(found) == 25


def test_cutout_removes_a_square_of_half_the_size_that_may_reach_over_the_edge() -> None:
    out = augment(torch.ones(400, 1, 8, 8), ("cutout",))
    holes = (out == 0).sum((1, 2, 3))
    assert set(out.unique().tolist()) == {0.0, 1.0}
    assert holes.max() == 16
    assert holes.min() == 4  # a quarter of it, in a corner
    rows = (out == 0).any(3).sum((1, 2))
    columns = (out == 0).any(2).sum((1, 2))
    assert torch.equal(rows * columns, holes)


def test_color_changes_brightness_saturation_and_contrast_of_each_image() -> None:
    images = torch.rand(500, 3, 4, 4) * 2 - 1
    out = augment(images, ("color",))
    gray, mean = images.mean(1, keepdim=True), images.mean((1, 2, 3), keepdim=True)
    shift = out.mean((1, 2, 3)) - mean.flatten()
    contrast = ((out.mean(1) - out.mean((1, 2, 3))[:, None, None]) / (gray - mean)[:, 0]).mean((1, 2))
    colored = (out - out.mean(1, keepdim=True)) / (images - gray)
    saturation = colored[:, 0, 0, 0] / contrast
    for values, low, high in ((shift, -0.5, 0.5), (contrast, 0.5, 1.5), (saturation, 0.0, 2.0)):
        assert low - 1e-3 < values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() < high + 1e-3
    mild = augment(images, ("color",), strength=0.0)
    torch.testing.assert_close(mild, images)


@pytest.mark.parametrize("names", [(name,) for name in ALL] + [ALL])
def test_every_transformation_is_twice_differentiable(names: tuple[str, ...]) -> None:
    images = torch.rand(3, 2, 6, 6, dtype=torch.float64, requires_grad=True)

    def scores(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return augment(x, names).pow(3).sum((1, 2, 3))

    assert torch.autograd.gradcheck(scores, images)
    assert torch.autograd.gradgradcheck(scores, images, fast_mode=True)


def test_a_probability_leaves_a_share_of_the_images_as_they_are() -> None:
    images = torch.rand(1000, 1, 4, 4)
    for probability in (0.0, 0.3, torch.tensor(0.3)):
        same = (augment(images, ("color",), probability=probability) == images).all(dim=(1, 2, 3)).float().mean()
        assert abs(same - (1 - float(probability))) < 0.06


@pytest.mark.parametrize("name", GANS)
@pytest.mark.parametrize("penalty", ["r1", "gradient"])
def test_both_batches_are_augmented_and_gradients_pass(name: str, penalty: str, monkeypatch: Any) -> None:
    model = small(name, augment="color,translation,cutout", penalty=penalty, penalty_every=1)
    seen: list[Tensor] = []
    forward = type(model.discriminator).forward

    def spy(self: Any, images: Tensor, *rest: Any) -> Tensor:
        seen.append(images)
        return forward(self, images, *rest)

    monkeypatch.setattr(type(model.discriminator), "forward", spy)
    data = batch()
    loss = model.loss("discriminator", data, StepContext(1, 10))
    assert all((images == 0).flatten(1).any(1).all() for images in seen[:2])  # cut out; each image differs
    assert not any(torch.equal(images, 2 * data["images"] - 1) for images in seen)
    loss["loss"].backward()
    assert loss["penalty"] > 0
    gradients = [weight.grad for weight in model.discriminator.parameters() if weight.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    seen.clear()
    model.loss("generator", data, StepContext(1, 10))["loss"].backward()
    assert (seen[0] == 0).flatten(1).any(1).all()
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.generator.parameters())


@pytest.mark.parametrize("name", ["dcgan", "stylegan"])
def test_without_augmentation_nothing_is_drawn_and_no_key_is_added(name: str) -> None:
    model, data = small(name, penalty="none"), batch()
    again = small(name, penalty="none", augment="flip")
    assert list(model.state_dict()) == list(again.state_dict())
    assert len(list(model.children())) == 2
    torch.manual_seed(1)
    found = model.loss("discriminator", data, StepContext(1, 10))
    after = torch.rand(1)
    assert {*found} == {"loss", "real", "fake"}
    torch.manual_seed(1)
    again.augmentation.names = ()
    torch.testing.assert_close(again.loss("discriminator", data, StepContext(1, 10))["loss"], found["loss"])
    assert torch.equal(torch.rand(1), after)


def test_the_probability_of_adaptive_augmentation_follows_the_sign_of_the_real_scores() -> None:
    model = small("dcgan", augment="translation", augment_target=0.6)
    assert {"augmentation.probability", "augmentation.sign"} <= {*model.state_dict()}
    values = model.loss("discriminator", batch(), StepContext(1, 10))
    assert values["augment"] == 0
    augmentation = Augmentation(("flip",), target=0.6)
    images = torch.rand(8, 1, 4, 4)
    assert torch.equal(augmentation(images), images)
    scores = torch.ones(1000)
    for _ in range(50):
        augmentation.observe(scores)
    assert 0.3 < augmentation.probability < 0.5  # 10 steps to a mean sign of 0.6, then 0.01 each
    for _ in range(200):
        augmentation.observe(scores)
    assert augmentation.probability == 1
    for _ in range(30):
        augmentation.observe(-scores)
    assert augmentation.probability < 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "rotate,flip"}, "augment: expected some of flip, color, translation, cutout, got rotate"),
        ({"augment_target": 0.6}, "augment_target: expected 0 without augment, got 0.6"),
        ({"augment": "flip", "augment_target": 1.0}, r"augment_target: expected a number in \[0, 1\), got 1.0"),
        ({"augment": "flip", "augment_target": 0.5, "loss": "wasserstein"}, "augment_target: expected 0 with the Wass"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small("dcgan", **options)


def test_names_are_in_the_order_in_which_they_are_applied() -> None:
    assert parse_augment(" cutout , flip") == ("flip", "cutout")
    assert parse_augment("") == ()


def test_training_images_are_augmented_by_the_seed_and_pairs_alike() -> None:
    images = torch.rand(20, 3, 16, 16)
    data = {"inputs": images, "targets": images.clone(), "labels": torch.arange(20)}
    out = augment_batch(data, ALL, seed=3)
    assert torch.equal(out["inputs"], out["targets"])
    assert torch.equal(out["labels"], data["labels"])
    assert not torch.equal(out["inputs"], images)
    assert 0 <= out["inputs"].min() < out["inputs"].max() <= 1
    assert torch.equal(augment_batch(data, ALL, seed=3)["inputs"], out["inputs"])
    assert not torch.equal(augment_batch(data, ALL, seed=4)["inputs"], out["inputs"])
    assert torch.equal(data["inputs"], images)


def test_what_enters_a_training_image_has_the_value_of_its_border() -> None:
    images = torch.full((50, 1, 16, 16), 0.25)
    images[:, :, 6:10, 6:10] = 0.75
    out = augment_batch({"images": images}, ("translation", "cutout"), seed=0)["images"]
    values = out.unique()
    assert len(values) == 2
    torch.testing.assert_close(values, torch.tensor([0.25, 0.75]))
