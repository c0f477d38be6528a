"""Defaults that follow the size of the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pytest

from fastgen.models import MODELS, GenerativeModel, from_data
from fastgen.models.sizes import DataSize, Size

DIGITS = DataSize("images", 1437, 8, 1)
CLASSES = ("cgan", "cdcgan", "cvae", "sagan")
OF_IMAGES = [name for name, model in MODELS.items() if model.sizes]
TRAINING = {"steps", "batch_size", "average_decay", "schedule", "learning_rate"}


def config_of(model: type[GenerativeModel], size: DataSize, options: Mapping[str, Any]) -> Any:
    facts: dict[str, Any] = {"kind": model.kind, "image_size": size.image_size, "channels": size.channels}
    facts |= {"input_channels": size.channels, "levels": 256, "classes": 10}
    own = from_data(model.config_class)
    given = {name: value for name, value in facts.items() if name in own}
    chosen = {name.removeprefix("model."): value for name, value in options.items() if name.startswith("model.")}
    return model.config_class(**given, **chosen)


def test_every_model_of_images_has_sizes() -> None:
    kinds = {"images", "pairs", "domains"}
    assert set(OF_IMAGES) == {name for name, model in MODELS.items() if model.kind in kinds}


@pytest.mark.parametrize("name", OF_IMAGES)
def test_small_images_keep_the_defaults(name: str) -> None:
    assert MODELS[name].suggested(DIGITS) == {}


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("size", [(20, 1), (28, 1), (32, 3), (48, 3), (64, 3)])
@pytest.mark.parametrize("name", OF_IMAGES)
def test_suggestions_are_options_that_fit_the_model(name: str, size: tuple[int, int], gpu: bool) -> None:
    model = MODELS[name]
    data = DataSize("images", 8000, *size, gpu=gpu)
    options = model.suggested(data)
    assert options["steps"] > 0
    known = {f"model.{field.name}" for field in fields(model.config_class)} | TRAINING
    assert set(options) <= known
    if name == "pix2pix" and size[0] % 16:
        return  # its default has four downsamplings
    config = config_of(model, data, options)
    assert config.image_size == size[0]


def test_every_gan_augments_few_images_and_no_others() -> None:
    for name in ("gan", "cgan", "dcgan", "cdcgan", "sagan", "attention-gan", "stylegan", "transgan"):
        few, many = (MODELS[name].suggested(DataSize("images", n, 64, 3)) for n in (240, 20_000))
        assert few["model.augment"] == "color,translation,cutout"
        assert "model.augment" not in many
        assert "model.augment" not in MODELS[name].suggested(DIGITS)


def test_steps_grow_with_the_items_and_autoencoders_stop_after_some_passes() -> None:
    def steps(items: int, passes: float = 0.0) -> int:
        return Size(5000, 50, passes).steps_for(DataSize("images", items, 28, 1))

    assert [steps(n) for n in (100, 10_000, 40_000, 10**7)] == [5000, 5000, 10_000, 20_000]
    assert steps(10**5) == 16_000  # 15811 in two digits
    assert [steps(n, 10) for n in (10, 2000, 10_000)] == [200, 400, 2000]
    many_digits = DataSize("images", 40_000, 8, 1)
    assert MODELS["dcgan"].suggested(many_digits) == {"steps": 6700}  # twice 3368


def test_vaes_of_black_and_white_pixels_are_bernoulli() -> None:
    for name in ("vae", "conv-vae", "cvae", "flow-vae"):
        two, many = (MODELS[name].suggested(DataSize("images", 8000, 28, 1, levels)) for levels in (2, 256))
        assert two == many | {"model.likelihood": "bernoulli"}
    assert MODELS["vae"].suggested(DataSize("images", 1437, 8, 1, 2)) == {}


@pytest.mark.parametrize("name", ["vae", "conv-vae", "cvae", "flow-vae"])
def test_the_warm_up_of_the_kl_takes_at_most_a_quarter_of_the_steps(name: str) -> None:
    found = MODELS[name].suggested(DataSize("images", 32, 28, 1))
    assert found["model.kl_warmup"] == found["steps"] // 4 < 230
    for items in (8000, 100_000):
        assert "model.kl_warmup" not in MODELS[name].suggested(DataSize("images", items, 28, 1))


def test_long_texts_are_trained_longer() -> None:
    model = MODELS["transformer-lm"]
    assert model.suggested(DataSize("text", 1_000_000)) == {}
    assert model.suggested(DataSize("text", 4_000_000)) == {"steps": 4800}
    assert model.suggested(DataSize("text", 10**9)) == {"steps": 7200}


def test_downsamplings_divide_the_image() -> None:
    for size, expected in ((64, 3), (36, 2), (34, 1)):
        options = MODELS["vq-vae"].suggested(DataSize("images", 8000, size, 3))
        assert options["model.num_downsamples"] == expected


def test_the_image_transformer_models_codes_unless_pixels_are_asked_for() -> None:
    model, data = MODELS["image-transformer"], DataSize("images", 8000, 28, 1)
    codes, pixels = model.suggested(data), model.suggested(data, {"model.codebook_size": 0})
    assert codes["model.codebook_size"] == 128
    assert "model.codebook_size" not in pixels
    assert pixels["batch_size"] < codes["batch_size"]
    assert "model.codebook_size" not in model.suggested(DataSize("images", 8000, 27, 1))
