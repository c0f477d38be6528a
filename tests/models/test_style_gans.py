"""Tests specific to StyleGAN and TransGAN; test_gans.py has the tests of all GANs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import losses
from fastgen.models.base import Images, NoOptions, StepContext
from fastgen.models.stylegan import (
    AVERAGE_STEP,
    ModulatedConv2d,
    StyleGAN,
    StyleGANConfig,
    StyleOptions,
    minibatch_std_map,
)
from fastgen.models.transgan import TransGAN, TransGANConfig, embedding

SMALL = {"latent_dim": 8, "width": 8, "style_dim": 8, "mapping_depth": 2}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_stylegan(**options: object) -> StyleGAN:
    torch.manual_seed(0)
    return StyleGAN(StyleGANConfig(**{**SMALL, **options}))  # type: ignore[arg-type]


def give_noise_strength(model: StyleGAN) -> None:
    for layer in model.generator.synthesis.layers:
        nn.init.ones_(layer.strength)


@pytest.mark.parametrize("demodulate", [True, False], ids=["demodulated", "plain"])
def test_a_modulated_convolution_equals_a_grouped_convolution_with_weights_per_image(demodulate: bool) -> None:
    """Values, first and second derivatives."""
    torch.manual_seed(0)
    layer = ModulatedConv2d(3, 5, 3, 4, demodulate=demodulate).double()
    x, style = torch.randn(2, 3, 6, 7, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)

    def grouped(x: Tensor, style: Tensor) -> Tensor:
        weight = layer.convolution.weight / 27**0.5 * layer.style(style)[:, None, :, None, None]
        if demodulate:
            weight = weight / (weight.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).sqrt()
        return F.conv2d(x.flatten(0, 1), weight.flatten(0, 1), padding=1, groups=2).view(2, 5, 6, 7)

    results = []
    for function in (layer, grouped):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, style)]
        y = function(*inputs)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [*inputs, *layer.parameters()])
        results.append([y, *first, *second])
    torch.testing.assert_close(*results)


def test_weights_have_unit_variance_and_the_mapping_s_are_divided_by_its_rate() -> None:
    model = small_stylegan(width=32, style_dim=64, mapping_rate=0.01)
    model_weights = {name: weight for name, weight in model.named_parameters() if weight.numel() > 2000}
    assert len(model_weights) == 14
    for name, weight in model_weights.items():
        wanted = 100.0 if "mapping" in name else 1.0
        torch.testing.assert_close(weight.std().item(), wanted, rtol=0.05, atol=0)


def test_the_lazy_path_length_penalty_updates_its_running_mean() -> None:
    options = {"path_length_weight": 3.0, "path_length_every": 2, "style_mixing": 0.0}
    model = small_stylegan(**options)
    model.discriminator.requires_grad_(False)
    batch = {"images": torch.rand(6, 1, 8, 8, generator=seeded(1))}
    before = copy.deepcopy(model)
    torch.manual_seed(3)
    without = model.loss("generator", batch, StepContext(1, 10))
    assert "path" not in without
    assert model.path_length_mean == 0
    torch.manual_seed(3)
    values = model.loss("generator", batch, StepContext(2, 10))

    torch.manual_seed(3)
    before.loss("generator", batch, StepContext(1, 10))  # samples what the loss samples
    z, noise = before.latents(3)
    styles = before.generator.styles(z)
    images = before.generator.synthesis(styles, noise)
    penalty, mean = losses.path_length_penalty(images, styles, 0.0)
    torch.testing.assert_close(values["path"], 2 * penalty.detach())
    torch.testing.assert_close(values["loss"], without["loss"] + 3 * 2 * penalty)
    assert model.path_length_mean > 0
    torch.testing.assert_close(model.path_length_mean, mean)
    assert "path_length_mean" in model.state_dict()
    assert not values["path"].requires_grad


def test_the_gradient_of_the_path_length_penalty_matches_finite_differences() -> None:
    """In the generator's weights, along the gradient itself, in float64."""
    model = small_stylegan(path_length_every=1, path_length_weight=1.0, style_mixing=0.0).double()
    give_noise_strength(model)
    model.discriminator.requires_grad_(False)
    batch = {"images": torch.rand(6, 1, 8, 8, generator=seeded(1)).double()}

    def penalty() -> Tensor:
        model.path_length_mean.fill_(1e3)  # large, so that the change of the mean itself is negligible
        torch.manual_seed(3)
        return model.loss("generator", batch, StepContext(1, 10))["loss"] / 1e3

    weights = list(model.generator.parameters())
    gradients = torch.autograd.grad(penalty(), weights)
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    ends = []
    for sign in (1, -2):
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.add_(gradient, alpha=sign * 1e-5 / norm.item())
        ends.append(penalty().item())
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, norm.item(), rtol=0.02, atol=0)


def test_truncation_moves_styles_to_their_mean_and_keeps_the_noise() -> None:
    model = small_stylegan()
    images = torch.rand(16, 1, 8, 8, generator=seeded(1))
    for step in range(1, 4):
        torch.manual_seed(step)
        model.loss("generator", {"images": images}, StepContext(step, 10))

    def spread(truncation: float) -> float:
        pixels = model.draw(32, StyleOptions(truncation), generator=seeded(2)).pixels
        return pixels.var(dim=0).mean().item()

    assert spread(0.0) < 1e-12 < spread(0.5) < spread(1.0)
    give_noise_strength(model)
    assert spread(0.0) > 1e-3
    with pytest.raises(ValueError, match=r"truncation: expected a number in \[0, 1\], got 1.5"):
        StyleOptions(1.5)


def test_the_running_mean_of_styles_is_updated_in_training_only() -> None:
    model = small_stylegan(style_mixing=0.0)
    mapping = model.generator.mapping
    z = torch.randn(16, 8, generator=seeded(1))
    w = mapping(z)
    torch.testing.assert_close(mapping.average, AVERAGE_STEP * w.mean(dim=0))
    kept = mapping.average.clone()
    model.draw(4, StyleOptions())
    model.visualize({})
    assert torch.equal(mapping.average, kept)
    torch.testing.assert_close(mapping(5 * z), w)  # z is normalized


def test_styles_are_mixed_in_training_from_one_layer_on() -> None:
    model = small_stylegan(style_mixing=0.5, image_size=32)
    z = torch.randn(200, 8, generator=seeded(1))
    own = model.generator.mapping(z)
    torch.manual_seed(2)
    styles = model.generator.styles(z)
    mine = (styles == own[:, None]).all(dim=2).int()
    assert mine.shape == (200, model.config.style_layers)
    assert mine[:, 0].all()
    assert (mine.diff(dim=1) <= 0).all()
    mixed = 1 - mine[:, -1].float().mean().item()
    assert 0.35 < mixed < 0.65
    assert set(mine.sum(dim=1).tolist()) == {1, 2, 3, 4, 5, 6, 7, 8}
    model.eval()
    assert (model.generator.styles(z) == model.generator.mapping(z)[:, None]).all()


def test_the_diagonal_of_the_style_mixing_grid_has_plain_samples() -> None:
    model = small_stylegan(channels=3)
    give_noise_strength(model)
    samples = model.visualize({}, generator=seeded(4))["styles"]
    assert isinstance(samples, Images)
    grid = samples.pixels.unflatten(0, (-1, samples.columns))
    plain = model.draw(len(grid), StyleOptions(), generator=seeded(4)).pixels
    torch.testing.assert_close(grid.diagonal().movedim(-1, 0), plain)
    assert not torch.equal(grid[0, 0], grid[0, 1])
    assert all(module.training for module in model.modules())


def test_the_minibatch_standard_deviation_is_computed_per_group() -> None:
    x = torch.randn(8, 3, 4, 4, generator=seeded(1))
    equal = x[:1].expand(8, -1, -1, -1)
    assert minibatch_std_map(equal).max() < 1e-3
    found = minibatch_std_map(x)
    assert found.shape == (8, 1, 4, 4)
    wanted = x[::2].std(dim=0, correction=0).mean()
    torch.testing.assert_close(found[::2], wanted.expand(4, 1, 4, 4), rtol=1e-4, atol=0)
    assert torch.isfinite(minibatch_std_map(x[:5])).all()
    model = small_stylegan()
    images = torch.rand(8, 1, 8, 8, generator=seeded(1))
    assert not torch.allclose(model.discriminator(images)[:4], model.discriminator(images[:4]))


def test_tokens_attend_within_their_window_and_beyond_it_in_shifted_blocks() -> None:
    torch.manual_seed(0)
    model = TransGAN(TransGANConfig(image_size=16, width=4, generator_depth=2, latent_dim=4))
    windows = [(m.window_size[0], m.shift[0]) for m in model.generator.modules() if hasattr(m, "window_size")]
    assert windows == [(4, 0), (4, 2), (8, 0), (8, 4), (8, 0), (8, 4)]
    last = list(model.generator)[-6:]  # position embedding, both blocks, norm, linear, tanh
    x = torch.randn(1, 4, 16, 16, generator=seeded(1))
    for blocks, beyond in ((last[:2], False), (last, True)):
        y = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(nn.Sequential(*blocks)(y)[0, 0, 5, 5], y)
        reached = gradient[0].abs().sum(dim=0) > 0
        assert reached[:8, :8].all()
        assert reached[8:, 8:].any() == beyond


def test_a_token_of_the_generator_becomes_a_patch() -> None:
    """After the last attention, a token reaches the pixels of its own patch only."""
    torch.manual_seed(0)
    model = TransGAN(TransGANConfig(image_size=16, channels=3, width=4, generator_patch_size=2, latent_dim=4))
    assert model(torch.randn(2, 4, generator=seeded(0))).shape == (2, 3, 16, 16)
    norm, linear, shuffle, tanh = list(model.generator)[-4:]
    x = torch.randn(1, 8, 8, 8, generator=seeded(1)).requires_grad_()
    out = tanh(shuffle(linear(norm(x))))
    for row, column in ((0, 0), (5, 9), (15, 14)):
        (gradient,) = torch.autograd.grad(out[0, :, row, column].sum(), x, retain_graph=True)
        assert gradient[0].abs().sum(dim=0).nonzero().tolist() == [[row // 2, column // 2]]
    first, second = (torch.autograd.grad(out[0, :, 0, i].sum(), x, retain_graph=True)[0] for i in (0, 1))
    assert not torch.allclose(first, second)  # pixels of one patch


@pytest.mark.parametrize("convolutions", [False, True])
def test_patches_overlap_with_convolutions_and_not_with_linear_maps(convolutions: bool) -> None:
    """Of patches of 4 pixels. Two convolutions of stride 2 read 3 pixels more on each side."""
    torch.manual_seed(0)
    config = TransGANConfig(image_size=16, channels=3, width=4, patch_size=4, convolutions=convolutions)
    image = torch.randn(1, 3, 16, 16, generator=seeded(1)).requires_grad_()
    tokens = nn.Sequential(*embedding(config))(image)
    assert tokens.shape == (1, 16, 4, 4)
    (read,) = torch.autograd.grad(tokens[0, :, 1, 1].sum(), image)
    reached = range(1, 11) if convolutions else range(4, 8)
    assert read[0].abs().sum(dim=(0, 1)).nonzero()[:, 0].tolist() == [*reached]


def test_the_generator_with_convolutions_adds_images_of_all_grids() -> None:
    torch.manual_seed(0)
    options = {"image_size": 16, "channels": 3, "width": 4, "latent_dim": 4, "generator_patch_size": 2}
    model = TransGAN(TransGANConfig(**options, convolutions=True))  # type: ignore[arg-type]
    images: list[Tensor] = []
    for to_image in model.generator.images:  # type: ignore[union-attr]
        to_image.register_forward_hook(lambda module, inputs, output: images.append(output))
    found = model(torch.randn(2, 4, generator=seeded(0)))
    assert [image.shape[2:] for image in images] == [(4, 4), (16, 16)]
    coarse = F.interpolate(images[0], scale_factor=4.0, mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, coarse + images[1])
    assert 0.05 < coarse.std() < 1
    assert images[1].std() > 0.05


def test_patches_of_one_pixel_with_convolutions() -> None:
    model = TransGAN(TransGANConfig(image_size=16, width=4, latent_dim=4, patch_size=1, convolutions=True))
    assert model.discriminator(torch.rand(2, 1, 16, 16)).shape == (2,)
    assert model(torch.randn(2, 4)).shape == (2, 1, 16, 16)


def test_a_generator_with_convolutions_is_not_bounded_by_tanh() -> None:
    """Its samples are clamped to [0, 1]."""
    model = TransGAN(TransGANConfig(image_size=8, width=4, latent_dim=4, convolutions=True))
    with torch.no_grad():
        model.generator.images[-1][-1].bias.fill_(3.0)  # type: ignore[union-attr, index]
    assert model(torch.randn(2, 4)).max() > 1
    assert model.draw(2, NoOptions()).pixels.max() == 1


def test_a_convolutional_discriminator_has_no_attention() -> None:
    model = TransGAN(TransGANConfig(image_size=28, width=4, latent_dim=4, patch_size=1, discriminator="convolutional"))
    kinds = {type(layer) for layer in model.discriminator}
    assert kinds == {nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU, nn.Flatten}
    images = torch.rand(3, 1, 28, 28, generator=seeded(0)).requires_grad_()
    scores = model.discriminator(images)
    assert scores.shape == (3,)
    (gradient,) = torch.autograd.grad(scores[0], images)
    assert gradient[0].abs().min() > 0
    with pytest.raises(ValueError, match="discriminator: expected"):
        TransGANConfig(discriminator="dense")  # type: ignore[arg-type]
