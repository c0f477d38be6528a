"""Invalid images, tokens, labels and audio raise errors, and extreme values do not overflow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.data import TensorItems
from fastgen.metrics.translations import evaluate_pairs, structural_similarity
from fastgen.models import MODELS, GenerativeModel, StepContext, to_pixels
from fastgen.models.lm_blocks import _rms_norm
from fastgen.models.stylegan import ModulatedConv2d, minibatch_std_map
from fastgen.models.transgan import TokenNorm
from fastgen.models.variational import pixels_log_prob
from fastgen.train.errors import UsageError
from fastgen.train.inspection import inspect

NOW = StepContext(1, 10)
CONFIGS: dict[str, dict[str, Any]] = {
    "gan": {"width": 8},
    "cgan": {"width": 8, "classes": 3},
    "dcgan": {"width": 4},
    "cdcgan": {"width": 4, "classes": 3},
    "sagan": {"width": 4, "classes": 3},
    "attention-gan": {"width": 4},
    "stylegan": {"width": 4},
    "transgan": {"width": 8},
    "recurrent-gan": {"generator_width": 8, "critic_width": 8},
    "cyclegan": {"image_size": 16, "width": 4, "blocks": 1, "patch_width": 4, "channels": 1},
    "pix2pix": {"image_size": 16, "width": 4, "patch_width": 4, "channels": 1},
    "vae": {"width": 8},
    "conv-vae": {"width": 4, "hidden_dim": 8},
    "cvae": {"width": 8, "classes": 3},
    "flow-vae": {"width": 8},
    "vq-vae": {"width": 4, "prior_width": 8},
    "image-transformer": {"width": 8, "num_heads": 2, "depth": 1, "conditional": True, "classes": 3},
    "transformer-lm": {"vocabulary": "abc", "context": 4, "width": 8, "num_heads": 2, "depth": 1},
    "seq2seq": {"vocabulary": "abc", "source_length": 4, "target_length": 4, "width": 8, "num_heads": 2},
    "wavenet": {"length": 9, "channels": 4, "skip_channels": 4, "cycle": 2, "reach": 3},
}
OF_IMAGES = [name for name in CONFIGS if MODELS[name].kind in ("images", "pairs", "domains")]
LABELLED = [name for name in CONFIGS if "classes" in CONFIGS[name]]


def small(name: str, **options: Any) -> GenerativeModel:
    torch.manual_seed(0)
    return MODELS[name](MODELS[name].config_class(**{**CONFIGS[name], **options}))


def batch_of(model: GenerativeModel) -> dict[str, Tensor]:
    config: Any = model.config
    if model.kind == "text":
        return {"tokens": torch.arange(10).view(2, 5) % 3}
    if model.kind == "sequences":
        return {"source": torch.tensor([[1, 3, 4, 2]] * 2), "target": torch.tensor([[1, 5, 2, 0]] * 2)}
    if model.kind == "audio":
        return {"audio": torch.linspace(-1, 1, 18).view(2, 9)}
    shape = (2, 1, config.image_size, config.image_size)
    images = torch.randint(0, 17, shape) / 16
    names = {"images": ["images"], "pairs": ["inputs", "targets"], "domains": ["a", "b"]}[model.kind]
    return {**{name: images.clone() for name in names}, "labels": torch.tensor([0, 2])}


def refuses(model: GenerativeModel, batch: dict[str, Tensor], kind: type[Exception], message: str) -> None:
    """In a step, in scores where there are any, and before training."""
    for phase in model.phases():
        with pytest.raises(kind, match=message):
            model.loss(phase.name, batch, NOW)
    if model.score(batch_of(model)):
        with pytest.raises(kind, match=message):
            model.score(batch)
    with pytest.raises(kind, match=message):
        model.check(batch)


@pytest.mark.parametrize("name", OF_IMAGES)
def test_images_of_another_range_dtype_or_shape_raise_an_error(name: str) -> None:
    model = small(name)
    good = batch_of(model)
    images = next(iter(good))
    bad: dict[str, tuple[Tensor, type[Exception], str]] = {
        "-1 to 1": (2 * good[images] - 1, ValueError, r"expected pixels in \[0, 1\], got -1 to 1; scale them"),
        "0 to 255": (255 * good[images], ValueError, r"expected pixels in \[0, 1\], got 0 to 255"),
        "8 bits": ((255 * good[images]).byte(), TypeError, "expected a floating-point tensor, got torch.uint8; .*255"),
        "color": (good[images].expand(-1, 3, -1, -1), ValueError, r"expected shape \(B, C, S, S\)"),
        "none": (good[images][:0], ValueError, "expected at least one item|expected as many|expected shape"),
    }
    for value, kind, message in bad.values():
        refuses(model, good | {images: value}, kind, f"(?s)({images}|labels|targets|b): {message}|{message}")


@pytest.mark.parametrize("name", [*OF_IMAGES, "wavenet"])
def test_nan_raises_an_error_before_training_and_makes_the_loss_of_a_step_nan(name: str) -> None:
    model = small(name)
    batch = batch_of(model)
    for field in batch.keys() - {"labels"}:
        batch[field][1, ..., 3] = math.nan
    with pytest.raises(ValueError, match="expected finite numbers, got NaN or infinite ones"):
        model.check(batch)
    if name in ("vae", "cvae", "conv-vae", "flow-vae", "vq-vae", "image-transformer", "wavenet"):
        score = model.eval().score(batch)
        assert score.get("elbo", score["nll"]).isnan().tolist() == [False, True]
    model.train()
    assert bool(model.loss(model.phases()[0].name, batch, NOW)["loss"].isnan())


@pytest.mark.parametrize("name", LABELLED)
def test_labels_outside_the_classes_raise_an_error(name: str) -> None:
    model = small(name)
    for labels, kind, message in (
        (torch.tensor([0, 3]), ValueError, "labels: expected integers from 0 to 2, got 0 to 3"),
        (torch.tensor([-1, 0]), ValueError, "labels: expected integers from 0 to 2, got -1 to 0"),
        (torch.tensor([0.0, 1.0]), TypeError, r"labels: expected an int64 tensor, got torch\.float32"),
        (torch.tensor([1]), ValueError, r"labels: expected shape \(B,\) = \(2,\), got \(1,\)"),
    ):
        refuses(model, batch_of(model) | {"labels": labels}, kind, message)


@pytest.mark.parametrize(
    ("name", "field", "count"), [("transformer-lm", "tokens", 3), ("seq2seq", "source", 6), ("seq2seq", "target", 6)]
)
@pytest.mark.parametrize("token", [-1, -100, 6])
def test_tokens_outside_the_vocabulary_raise_an_error(name: str, field: str, count: int, token: int) -> None:
    model = small(name)
    batch = batch_of(model)
    batch[field][-1, -1] = token  # the last one is no input, just a target
    refuses(model, batch, ValueError, f"{field}: expected integers from 0 to {count - 1}, got ")


def test_tokens_outside_the_vocabulary_of_a_recurrent_gan_raise_an_error() -> None:
    for kind, field, batch in (
        ("text", "tokens", {"tokens": torch.tensor([[0, 1, 2, 3]])}),
        ("sequences", "source", {"source": torch.tensor([[1, -3, 2]]), "target": torch.tensor([[1, 3, 2]])}),
    ):
        options = {"kind": kind, "vocabulary": "abc", "text_length": 4, "source_length": 3, "target_length": 3}
        model = small("recurrent-gan", **options)
        for call in (lambda m=model, b=batch: m.score(b), lambda m=model, b=batch: m.check(b)):
            with pytest.raises(ValueError, match=f"{field}: expected integers from 0 to "):
                call()


def test_targets_of_padding_alone_raise_an_error() -> None:
    model = small("seq2seq")
    with pytest.raises(ValueError, match="target: expected at least one token after the start, got nothing"):
        model.loss("target", {"source": batch_of(model)["source"], "target": torch.tensor([[1, 0, 0, 0]] * 2)}, NOW)


def test_negative_tokens_raise_an_error_and_do_not_wrap_around() -> None:
    model: Any = small("image-transformer")
    with pytest.raises(ValueError, match="tokens: expected integers from 0 to 16, got -1 to 0"):
        model.pixels(torch.tensor([[-1, *[0] * 63]]))
    model = small("wavenet")
    with pytest.raises(ValueError, match="levels: expected integers from 0 to 255, got -1 to 0"):
        model(torch.tensor([[0, -1]]))


@pytest.mark.parametrize(
    ("audio", "kind", "message"),
    [
        (torch.full((2, 9), 300.0), ValueError, r"audio: expected samples in \[-1, 1\], got 300 to 300"),
        (torch.zeros(2, 9, dtype=torch.int16), TypeError, r"audio: expected a floating-point tensor, .*32768"),
        (torch.zeros(0, 9), ValueError, r"audio: expected at least one item"),
    ],
    ids=["16 bits as floats", "16 bits", "none"],
)
def test_audio_out_of_range_raises_an_error(audio: Tensor, kind: type[Exception], message: str) -> None:
    refuses(small("wavenet"), {"audio": audio}, kind, message)


def test_pairs_and_domains_of_different_lengths_raise_an_error() -> None:
    for name, field, first in (("pix2pix", "targets", "inputs"), ("cyclegan", "b", "a")):
        model = small(name)
        batch = batch_of(model)
        batch[field] = batch[field][:1]
        for call in (lambda m=model, b=batch: m.score(b), lambda m=model, b=batch: m.loss("generator", b, NOW)):
            with pytest.raises(ValueError, match=f"{field}: expected as many items as {first}, 2, got 1"):
                call()


def test_training_raises_an_error_for_invalid_data() -> None:
    model = small("cvae")
    good = batch_of(model)
    bad = good | {"labels": torch.tensor([0, 5])}
    inspect(model, (TensorItems(good), TensorItems(good)))
    with pytest.raises(UsageError, match="data: held-out items: labels: expected integers from 0 to 2, got 0 to 5"):
        inspect(model, (TensorItems(good), TensorItems(bad)))


# --------------------------------------------------------------------------------------------------
# Calls that do not read values: traced ones, other devices


@pytest.mark.parametrize("likelihood", ["beta-binomial", "binomial", "gaussian"])
def test_pixels_out_of_range_have_no_probability_and_nan_stays_nan(
    monkeypatch: pytest.MonkeyPatch, likelihood: str
) -> None:
    monkeypatch.setattr("fastgen.models.variational.can_read_values", lambda tensor: False)
    count = 1 if likelihood == "binomial" else 2
    parameters = torch.randn(4, count, 2, 2, requires_grad=True)
    images = torch.rand(4, 1, 2, 2)
    images[1, 0, 0, 0], images[2, 0, 0, 0], images[3, 0, 0, 0] = -1.0, 255.0, math.nan
    log_prob = pixels_log_prob(parameters, images, likelihood, 17)
    assert bool(log_prob[0].isfinite())
    assert log_prob[1] == log_prob[2] == -math.inf
    assert bool(log_prob[3].isnan())
    log_prob[:3].sum().backward()
    assert parameters.grad is not None
    assert bool(parameters.grad[:3].isfinite().all())
    with pytest.raises(ValueError, match=r"images: expected shape \(B, C, H, W\) = \(4, 3, 2, 2\), got \(4, 1, 2, 2\)"):
        pixels_log_prob(torch.randn(4, 3 * count, 2, 2), images, likelihood, 17)


@pytest.mark.parametrize("options", [{}, {"codebook_size": 4}], ids=["pixels", "codes"])
def test_scores_of_nan_images_are_nan_where_values_are_not_read(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
) -> None:
    monkeypatch.setattr("fastgen.batch.checks.can_read_values", lambda tensor: False)
    for name in ("image-transformer", "vq-vae"):
        model = small(name, **options).eval()
        batch = batch_of(model)
        batch["images"][1, 0, 0, 0] = math.nan
        for metric in ("nll", "elbo"):
            found = model.score(batch).get(metric, torch.tensor([0, math.nan]))
            assert found.isnan().tolist() == [False, True]
        for phase in model.phases():
            assert bool(model.loss(phase.name, batch, NOW)["loss"].isnan())


def test_an_encoder_whose_weights_are_nan_has_no_codes() -> None:
    model: Any = small("vq-vae")
    with torch.no_grad():
        model.autoencoder.encoder[0].weight.fill_(math.nan)
    with pytest.raises(ValueError, match="images: expected finite features of each, got NaN or infinite ones"):
        model.encode(torch.rand(2, 1, 8, 8))
    score = model.score(batch_of(model))
    assert bool(score["elbo"].isnan().all())
    assert bool(score["squared error"].isnan().all())


def test_pixels_out_of_range_are_clipped_and_infinite_ones_are_nan() -> None:
    found = to_pixels(torch.tensor([-3.0, -1.0, 0.5, 7.0, math.inf, -math.inf, math.nan]))
    torch.testing.assert_close(found, torch.tensor([0, 0, 0.75, 1, *[math.nan] * 3]), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_of_squares_do_not_overflow_in_half_precision(dtype: torch.dtype) -> None:
    x = (400 * torch.randn(2, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    root = x.double().square().mean(1, keepdim=True).sqrt()
    tokens = TokenNorm(64).to(dtype)(x[:, :, None, None]).flatten(1)
    torch.testing.assert_close(tokens.double(), x.double() / root, rtol=0.02, atol=0.01)
    normed = _rms_norm(x, torch.ones(64, dtype=dtype), torch.tensor(1e-6, dtype=dtype))
    assert normed.dtype == dtype
    torch.testing.assert_close(normed.double(), x.double() / root, rtol=0.02, atol=0.01)
    layer = ModulatedConv2d(64, 3, 1, 5)
    with torch.no_grad():
        layer.style.bias.fill_(400.0)
        expected = layer(torch.ones(2, 64, 2, 2), torch.randn(2, 5))
        found = layer.to(dtype)(torch.ones(2, 64, 2, 2, dtype=dtype) / 64, torch.zeros(2, 5, dtype=dtype)) * 64
    assert bool(found.isfinite().all())
    assert expected.abs().max() > 0


def test_identical_images_have_a_finite_gradient_in_half_precision() -> None:
    x = torch.ones(4, 2, 3, 3, dtype=torch.float16, requires_grad=True)
    minibatch_std_map(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_metrics_of_pairs_do_not_broadcast_one_image_over_many() -> None:
    images = torch.rand(4, 1, 8, 8)
    with pytest.raises(ValueError, match=r"others: expected the shape of images \(4, 1, 8, 8\), got \(1, 1, 8, 8\)"):
        structural_similarity(images, images[:1])
    with pytest.raises(ValueError, match="inputs: expected as many images as targets"):
        evaluate_pairs(images, images, images[:1])
