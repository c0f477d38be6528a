"""ImageTransformer: training, cached sampling, labels, captions and codes."""

from __future__ import annotations

import doctest
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.models import image_transformer
from fastgen.models.base import StepContext, from_data
from fastgen.models.image_transformer import ImageTransformer, ImageTransformerConfig, PixelOptions
from fastgen.models.transformer_lm import CachedBlocks

NOW = StepContext(1, 10)
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "conditional": {"classes": 3, "conditional": True},
    "color": {"channels": 3, "image_size": 3},
    "captions": {
        "captions": True,
        "caption_vocabulary": "abc",
        "caption_length": 3,
        "caption_examples": ["a", "bc", "cab"],
        "classes": 3,
    },
    "codes": {"codebook_size": 5, "num_downsamples": 1},
    "codes with captions": {
        "codebook_size": 5,
        "num_downsamples": 1,
        "captions": True,
        "caption_vocabulary": "abc",
        "caption_length": 3,
        "caption_examples": ["a", "bc", "cab"],
    },
    "swiglu, few tones": {"activation": "swiglu", "levels": 256, "tones": 5, "qk_norm": False},
}


def small_model(**options: Any) -> ImageTransformer:
    torch.manual_seed(0)
    config = {"image_size": 4, "levels": 6, "width": 16, "num_heads": 2, "depth": 2, "dropout": 0.0, **options}
    return ImageTransformer(ImageTransformerConfig(**config))


def random_batch(n: int, config: ImageTransformerConfig) -> dict[str, Tensor]:
    shape = (n, config.channels, config.image_size, config.image_size)
    counts = torch.randint(0, config.levels, shape, generator=seeded(1))
    labels = torch.arange(n) % 3
    captions = torch.tensor([[1, 0, 0], [2, 3, 0], [3, 1, 2]])  # a, bc, cab
    return {"images": counts / (config.levels - 1), "labels": labels, "caption": captions[labels]}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_completions_have_the_shape_of_the_images(variant: str) -> None:
    model = small_model(**VARIANTS[variant])
    batch = random_batch(5, model.config)
    shown = model.visualize(batch, generator=seeded(0))["completions"]
    assert (shown.pixels.shape, shown.columns) == ((15, *batch["images"].shape[1:]), 5)


def test_tokens_are_levels_in_raster_order_with_a_pixel_s_channels_together() -> None:
    model = small_model(channels=3, image_size=2)
    images = torch.arange(12).view(1, 2, 2, 3).movedim(-1, 1) % 6 / 5
    assert model.tokens(images).tolist() == [[0, 1, 2, 3, 4, 5] * 2]
    torch.testing.assert_close(model.pixels(model.tokens(images)), images)


@pytest.mark.parametrize(("levels", "tones"), [(256, 16), (256, 17), (6, 4), (6, 6), (5, 17)])
def test_neighboring_levels_share_a_tone(levels: int, tones: int) -> None:
    model = small_model(levels=levels, tones=tones, image_size=2)
    tone = model.tone_of_level
    assert (tone.diff() >= 0).all()
    assert (tone[0], tone[-1]) == (0, min(levels, tones) - 1)
    sizes = torch.bincount(tone)
    assert sizes.max() - sizes.min() <= 1
    means = [(torch.arange(levels)[tone == t].double() / (levels - 1)).mean() for t in range(len(sizes))]
    torch.testing.assert_close(model.pixel_of_tone, torch.stack(means).float())


@pytest.mark.parametrize(("levels", "tones"), [(3, 3), (5, 2)])
def test_probabilities_of_all_images_sum_to_one(levels: int, tones: int) -> None:
    model = small_model(image_size=2, levels=levels, tones=tones).eval()
    images = torch.cartesian_prod(*[torch.arange(float(levels))] * 4).view(-1, 1, 2, 2) / (levels - 1)
    total = (-model.score({"images": images})["nll"]).exp().sum()
    torch.testing.assert_close(total, torch.tensor(1.0))


def test_samples_have_the_probabilities_of_the_score() -> None:
    model = small_model(image_size=2, levels=2).eval()
    images = torch.cartesian_prod(*[torch.arange(2.0)] * 4).view(-1, 1, 2, 2)
    wanted = (-model.score({"images": images})["nll"]).exp()
    pixels = model.draw(20_000, PixelOptions(), generator=seeded(0)).pixels
    counts = torch.bincount((pixels.flatten(1) @ torch.tensor([8.0, 4, 2, 1])).long(), minlength=16) / 20_000
    assert ((counts - wanted).abs() < 5 * (wanted / 20_000).sqrt()).all()


def test_no_prediction_depends_on_later_tokens() -> None:
    model = small_model().eval()
    tokens = model.tokens(random_batch(2, model.config)["images"])[:, :-1]
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 6
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8], after[:, 8])


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_logits_equal_one_forward(variant: str) -> None:
    model = small_model(**VARIANTS[variant]).eval()
    batch = random_batch(3, model.config)
    tokens, labels, captions = model.tokens(batch["images"])[:, :-1], batch["labels"], batch["caption"]
    with torch.no_grad():
        whole, x = model(tokens, labels, captions), model._embed(tokens, labels, captions)
        x = x + model._positions(x.device)[: x.size(1)]
        past = CachedBlocks(model.decoder, model.rotary, 3, x.size(1), model.embedding.weight)
        parts = torch.cat([past(part) for part in x.tensor_split((1, 2, 3), dim=1)], dim=1)
    logits = model.logits(model.norm(parts[:, model.config.prefix :]))
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("known", [0, 5, 15, 16])
def test_completions_keep_given_tokens_and_are_greedy_at_temperature_0(known: int) -> None:
    model = small_model().eval()
    tokens = model.tokens(random_batch(3, model.config)["images"])[:, :known]
    completed = model.complete(tokens, temperature=0.0)
    assert torch.equal(completed[:, :known], tokens)
    for at in range(known, 16):
        assert torch.equal(completed[:, at], model(completed[:, :at])[:, -1].argmax(1))


def test_score_and_loss_are_the_cross_entropy_of_the_next_value() -> None:
    model = small_model().eval()
    batch = random_batch(4, model.config)
    tokens = model.tokens(batch["images"])
    wanted = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens.flatten(), reduction="none").view(4, -1)
    torch.testing.assert_close(model.score(batch)["nll"], wanted.sum(1))
    torch.testing.assert_close(model.loss("pixels", batch, NOW)["loss"], wanted.mean())
    assert abs(wanted.mean().item() - math.log(6)) < 1.0  # an untrained model is close to uniform


def test_training_steps_lower_the_loss_and_labels_condition_the_samples() -> None:
    """Every class has one image."""
    model = small_model(classes=3, conditional=True)
    batch = random_batch(3, model.config)
    (phase,) = model.phases()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, phase.betas, weight_decay=phase.weight_decay)
    values = []
    for _ in range(60):
        loss = model.loss("pixels", batch, NOW)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.1 * values[0]
    for label in range(3):
        samples = model.draw(2, PixelOptions(label=label, temperature=0.0)).pixels
        torch.testing.assert_close(samples, batch["images"][label].expand(2, -1, -1, -1))
    in_turn = model.draw(6, PixelOptions(temperature=0.0))
    assert in_turn.columns == 3
    torch.testing.assert_close(in_turn.pixels, batch["images"].repeat(2, 1, 1, 1))


@pytest.mark.parametrize("variant", ["captions", "codes with captions"])
def test_captions_condition_the_samples(variant: str) -> None:
    """Every caption has one image; with codes, the reconstruction of the untrained autoencoder."""
    model = small_model(**VARIANTS[variant])
    batch = random_batch(3, model.config)
    phase = model.phases()[-1]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, phase.betas)
    for _ in range(80):
        optimizer.zero_grad()
        model.loss(phase.name, batch, NOW)["loss"].backward()
        optimizer.step()
    wanted = model.pixels(model.tokens(batch["images"]))
    for i, caption in enumerate(("a", "bc", "cab")):
        samples = model.draw(2, PixelOptions(caption=caption, temperature=0.0))
        torch.testing.assert_close(samples.pixels, wanted[i].expand(2, -1, -1, -1))
        assert samples.labels is None
    backward = model.draw_captioned(batch["caption"].flip(0), PixelOptions(temperature=0.0))
    torch.testing.assert_close(backward.pixels, wanted.flip(0))
    in_turn = model.draw(6, PixelOptions(temperature=0.0))
    assert in_turn.columns == 3
    torch.testing.assert_close(in_turn.pixels, wanted.repeat(2, 1, 1, 1))
    assert (in_turn.labels is None) == (variant != "captions")  # they are the names of classes


def test_invalid_captions_raise_an_error() -> None:
    conditional, plain = small_model(**VARIANTS["captions"]), small_model()
    with pytest.raises(ValueError, match=r"^caption: expected characters of the vocabulary, got 'e', 'x'$"):
        conditional.draw(2, PixelOptions(caption="axe"))
    with pytest.raises(ValueError, match=r"^caption: expected at most 3 characters, as in the data, got 4$"):
        conditional.draw(2, PixelOptions(caption="abba"))
    with pytest.raises(ValueError, match=r"^caption: expected none, as the model has no captions, got 'a'$"):
        plain.draw(2, PixelOptions(caption="a"))
    with pytest.raises(ValueError, match=r"^captions: expected a model with captions, got one without"):
        plain.draw_captioned(torch.zeros(2, 3, dtype=torch.int64), PixelOptions())
    with pytest.raises(ValueError, match=r"^caption: expected shape \(B, caption_length\) = \(1, 3\), got \(1, 2\)"):
        conditional.draw_captioned(torch.zeros(1, 2, dtype=torch.int64), PixelOptions())
    with pytest.raises(ValueError, match=r"^caption: expected \(B, 3\) int64 with captions, got none"):
        conditional.score({"images": random_batch(2, conditional.config)["images"]})
    with pytest.raises(ValueError, match=r"^caption: expected shape \(B, caption_length\) = \(2, 3\), got \(2, 4\)"):
        conditional(torch.zeros(2, 3, dtype=torch.int64), None, torch.zeros(2, 4, dtype=torch.int64))


def test_the_elbo_of_codes_is_the_sum_of_both_likelihoods() -> None:
    model = small_model(**VARIANTS["codes"]).eval()
    batch = random_batch(4, model.config)
    codes = model.autoencoder.encode(batch["images"])
    scores = model.score(batch)
    assert codes.shape == (4, 2, 2)
    logits = model(codes.flatten(1)[:, :-1])
    wanted = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view(4, -1).sum(1)
    torch.testing.assert_close(scores["kl"], wanted)
    torch.testing.assert_close(scores["elbo"], -scores["nll"] - scores["kl"])


def test_invalid_labels_raise_an_error() -> None:
    conditional, plain = small_model(classes=3, conditional=True), small_model(classes=3)
    with pytest.raises(ValueError, match="label: expected -1 or a class below 3, got 3"):
        conditional.draw(2, PixelOptions(label=3))
    with pytest.raises(ValueError, match="label: expected -1, as the model is not conditional, got 0"):
        plain.draw(2, PixelOptions(label=0))
    with pytest.raises(ValueError, match=r"labels: expected \(B,\) int64, got a batch without labels"):
        conditional.loss("pixels", {"images": random_batch(2, conditional.config)["images"]}, NOW)


CONFIG_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "no size": ({"image_size": 0}, "image_size: expected a positive integer, got 0"),
    "too large": (
        {"image_size": 64, "channels": 3},
        "image_size: expected at most 4096 values in an image, got 3 x 64 x 64 = 12288",
    ),
    "one level": ({"levels": 1}, "levels: expected an integer >= 2, got 1"),
    "one tone": ({"tones": 1}, "tones: expected an integer >= 2, got 1"),
    "no captions": ({"captions": True}, "captions: expected false, as the data has no captions, got true"),
    "class and caption": (
        {**VARIANTS["captions"], "conditional": True},
        "captions: expected false with conditional, got true",
    ),
    "one code": ({"codebook_size": 1}, "codebook_size: expected at least 2, got 1"),
    "a map of no size": (
        {"codebook_size": 8, "image_size": 6},
        "image_size: expected a multiple of 4, as num_downsamples = 2, got 6",
    ),
    "no classes": ({"conditional": True}, "conditional: expected false, as the data has 0 classes, got true"),
    "heads that do not divide": ({"width": 15}, "width: expected an even multiple of num_heads = 4, got 15"),
    "a negative mlp": ({"mlp_width": -1}, "mlp_width: expected an integer >= 0, got -1"),
    "an unknown activation": ({"activation": "sine"}, "activation: expected one of gelu, swiglu, got 'sine'"),
    "a dropout of 1": ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
    "a learning rate of 0": ({"learning_rate": 0.0}, "learning_rate: expected a positive number, got 0.0"),
    "a negative decay": ({"weight_decay": -1.0}, "weight_decay: expected a number >= 0, got -1.0"),
}


@pytest.mark.parametrize("mistake", CONFIG_ERRORS)
def test_invalid_configs_raise_an_error_that_names_the_option(mistake: str) -> None:
    options, message = CONFIG_ERRORS[mistake]
    with pytest.raises(ValueError, match=f"^{message}"):
        ImageTransformerConfig(**options)
    fields = ["image_size", "channels", "levels", "classes"]
    assert from_data(ImageTransformerConfig) == [*fields, "caption_vocabulary", "caption_length", "caption_examples"]


def test_invalid_images_and_tokens_raise_an_error() -> None:
    model = small_model()
    with pytest.raises(ValueError, match=r"images: expected shape \(B, C, S, S\) = \(2, 1, 4, 4\), got \(2, 3, 4, 4\)"):
        model.score({"images": torch.zeros(2, 3, 4, 4)})
    with pytest.raises(ValueError, match=r"tokens: expected \(B, N\) with N at most 15, got \(2, 16\)"):
        model(torch.zeros(2, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tokens: expected \(B, N\) with N at most 16, got \(2, 17\)"):
        model.complete(torch.zeros(2, 17, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"tokens: expected an int64 tensor, got torch\.float32"):
        model(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"labels: expected \(B,\) int64, as the model is conditional, got None"):
        small_model(classes=3, conditional=True).complete(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="temperature: expected a number >= 0, got -1"):
        PixelOptions(temperature=-1)


def test_examples_in_docstrings_run() -> None:
    results = doctest.testmod(image_transformer, extraglobs={"torch": torch})
    assert results.attempted
    assert results.failed == 0
