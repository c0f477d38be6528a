"""Interpolation between latents, and the methods that all autoencoders have."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from fastgen.models import MODELS, Images, create_model
from fastgen.models.interpolation import great_circles, row_labels
from fastgen.models.sagan import attention_maps
from fastgen.nn import SelfAttention2d

SMALL: dict[str, dict[str, Any]] = {
    "gan": {"width": 8, "depth": 1},
    "cgan": {"width": 8, "depth": 1, "classes": 3},
    "dcgan": {"width": 4},
    "cdcgan": {"width": 4, "classes": 3},
    "sagan": {"width": 8, "classes": 3},
    "attention-gan": {"width": 4},
    "stylegan": {"width": 4, "style_dim": 8},
    "transgan": {"width": 4},
    "vae": {"width": 8, "depth": 1},
    "conv-vae": {"width": 4},
    "cvae": {"width": 8, "depth": 1, "classes": 3},
    "flow-vae": {"width": 8, "depth": 1},
}
AUTOENCODERS = ("vae", "conv-vae", "cvae", "flow-vae", "vq-vae")


def test_great_circles_keep_the_length_and_end_where_they_should() -> None:
    ends = torch.nn.functional.normalize(torch.randn(6, 20, dtype=torch.float64, generator=torch.manual_seed(0)), dim=1)
    path = great_circles(ends, 5).view(3, 5, 20)
    torch.testing.assert_close(path[:, 0], ends[::2])
    torch.testing.assert_close(path[:, -1], ends[1::2])
    torch.testing.assert_close(path.norm(dim=2), torch.ones(3, 5, dtype=torch.float64))
    steps = (path[:, 1:] * path[:, :-1]).sum(2)
    torch.testing.assert_close(steps, steps[:, :1].expand(-1, 4))  # equal angles


def test_parallel_ends_are_joined_by_a_line() -> None:
    end = torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.0, 0.0], [0.0, 1.0]])
    path = great_circles(end, 3).view(2, 3, 2)
    torch.testing.assert_close(path[0, 1], torch.tensor([1.5, 3.0]))
    assert path.isfinite().all()


def test_rows_have_one_class_each() -> None:
    assert row_labels(4, 2, -1, 3).tolist() == [0, 0, 1, 1, 2, 2, 0, 0]
    assert row_labels(2, 2, 1, 3).tolist() == [1] * 4
    with pytest.raises(ValueError, match="label: expected -1 or a class below 3, got 3"):
        row_labels(2, 2, 3, 3)


@pytest.mark.parametrize("name", SMALL)
def test_images_change_gradually_from_end_to_end(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, image_size=8, **SMALL[name]).eval()
    options = model.sampling_class(truncation=0.7) if name == "stylegan" else model.sampling_class()

    def images(columns: int) -> Images:
        made: Images = model.interpolate(3, columns, options, generator=torch.Generator().manual_seed(1))
        assert made.columns == columns
        assert made.pixels.shape == (3 * columns, 1, 8, 8)
        return made

    coarse, fine = images(2).pixels.view(3, 2, -1), images(33).pixels.view(3, 33, -1)
    torch.testing.assert_close(fine[:, [0, -1]], coarse)
    whole = (coarse[:, 0] - coarse[:, 1]).abs().amax(1)
    steps = (fine[:, 1:] - fine[:, :-1]).abs().amax((1, 2))
    assert (whole > 0).all()
    assert (steps < 0.5 * whole + 1e-6).all()
    labels = images(2).labels
    assert (labels is None) == ("classes" not in SMALL[name])
    if labels is not None:
        assert labels.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(SMALL)))
def test_models_without_a_continuous_latent_say_so(name: str) -> None:
    model = MODELS[name]
    with pytest.raises(TypeError, match="expected a model with a continuous latent"):
        model.interpolate(object.__new__(model), 1, 2, None)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_every_autoencoder_encodes_decodes_and_reconstructs(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, image_size=8, width=8).eval()
    images = torch.randint(0, 17, (3, 1, 8, 8)) / 16
    conditions = (torch.tensor([0, 1, 2]),) if name == "cvae" else ()
    assert set(inspect.signature(model.reconstruct).parameters) == {"images"} | ({"labels"} if conditions else set())
    assert model(images, *conditions).loss.dim() == 0
    encoded = model.encode(images, *conditions)
    z = encoded[0] if isinstance(encoded, tuple) else encoded
    with torch.no_grad():
        decoded = model.decode(z, *conditions)
    assert decoded.shape == model.reconstruct(images, *conditions).shape == images.shape


@pytest.mark.parametrize("name", ["dcgan", "vae", "sagan"])
def test_a_saved_model_samples_a_tensor_without_options(name: str, tmp_path: Any) -> None:
    model = create_model(name, image_size=8, **SMALL[name])
    model.save_pretrained(tmp_path / "model")
    pixels = MODELS[name].from_pretrained(tmp_path / "model").sample(16)
    assert isinstance(pixels, torch.Tensor)
    assert pixels.shape == (16, 1, 8, 8)


def test_attention_maps_are_the_weights_of_the_layer() -> None:
    """The output that the weights give by hand is the layer's."""
    torch.manual_seed(0)
    layer = SelfAttention2d(16).eval()
    torch.nn.init.ones_(layer.gamma)
    x = torch.randn(2, 16, 5, 5)
    maps, places = attention_maps(layer, x, 5)
    assert places == [0, 1, 2, 3, 4]
    weights = maps.flatten(2) / maps.flatten(2).sum(2, keepdim=True)
    with torch.no_grad():
        attended = weights @ layer.value(x).flatten(2).transpose(1, 2)  # (B, places, D)
        expected = layer.out(attended.transpose(1, 2)[..., None])[..., 0] + x.diagonal(dim1=2, dim2=3)
        torch.testing.assert_close(expected, layer(x).diagonal(dim1=2, dim2=3), rtol=1e-4, atol=1e-5)


def test_sagan_shows_its_attention() -> None:
    torch.manual_seed(0)
    model = create_model("sagan", image_size=8, width=8, channels=3)
    shown = model.visualize({}, generator=torch.Generator().manual_seed(0))["attention"]
    assert shown.columns == 7
    assert shown.pixels.shape == (8 * 2 * 7, 3, 8, 8)
    assert 0 <= shown.pixels.min() < shown.pixels.max() <= 1
    rows = shown.pixels.view(8, 2, 7, 3, 8, 8)
    torch.testing.assert_close(rows[:, 0, 1:].amax((2, 3, 4)), torch.ones(8, 6))
    changed = (rows[:, 1, 1:] != rows[:, 0, :1]).any(2).flatten(2).sum(2)
    assert (changed <= 1).all()  # the mark
    assert not model.generator.attention._forward_pre_hooks
