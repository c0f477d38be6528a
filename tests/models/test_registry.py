"""Models by name: listing, making, and adding one's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from fastgen.models import DCGAN, MODELS, GenerativeModel, create_model, find_model, list_models, option, register_model


@dataclass(frozen=True)
class TinyConfig:
    width: int = option(8, "number of channels")


class Tiny(GenerativeModel):
    name, summary, kind, config_class = "tiny", "for a test", "images", TinyConfig


@pytest.fixture
def registered() -> Iterator[type[GenerativeModel]]:
    yield register_model(Tiny)
    del MODELS["tiny"]


def test_models_are_listed_by_pattern_and_kind() -> None:
    assert list_models() == sorted(MODELS)
    assert list_models("*dcgan") == ["cdcgan", "dcgan"]
    assert "wavenet" in list_models(kind="audio")
    assert "recurrent-gan" in list_models(kind="text")
    with pytest.raises(ValueError, match=r"^kind: expected one of images, .*, got 'video'"):
        list_models("*", kind="video")


def test_a_model_is_created_with_options() -> None:
    model = create_model("dcgan", image_size=16, channels=3, width=4)
    assert isinstance(model, DCGAN)
    images = model.sample(2, generator=torch.Generator().manual_seed(0))
    assert images.shape == (2, 3, 16, 16)


def test_an_unknown_name_or_option_raises_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected one of .*got 'DC_GAN'; did you mean 'dcgan'\?"):
        find_model("DC_GAN")
    with pytest.raises(TypeError, match=r"dcgan: expected options among image_size, .*, got size"):
        create_model("dcgan", size=3)
    with pytest.raises(ValueError, match="width: expected a positive integer, got 0"):
        create_model("dcgan", width=0)
    with pytest.raises(TypeError, match=r"dcgan: expected options among temperature, got label"):
        create_model("dcgan", width=4).sample(1, label=3)


def test_a_user_model_is_registered(registered: type[GenerativeModel]) -> None:
    assert "tiny" in list_models()
    assert create_model("tiny", width=4).config == TinyConfig(4)
    assert register_model(registered) is registered


def test_an_invalid_class_raises_an_error() -> None:
    with pytest.raises(TypeError, match="expected a subclass of GenerativeModel"):
        register_model(torch.nn.Linear)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="expected a class attribute 'name', got none"):
        register_model(type("Nameless", (GenerativeModel,), {}))
    with pytest.raises(ValueError, match=r"expected a name that is not registered, got 'dcgan', which is .*DCGAN"):
        register_model(type("Second", (Tiny,), {"name": "dcgan"}))
