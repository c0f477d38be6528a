"""The convolutional VAE and its sampling layer."""

from __future__ import annotations

import doctest
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import functional
from fastgen.models import ConvVAE, ConvVAEConfig, StepContext, conv_vae
from fastgen.models.variational import beta_binomial_log_prob, beta_binomial_parameters, binomial_log_prob
from fastgen.nn import GaussianLatent

SMALL = {"width": 4, "hidden_dim": 16}


def small_model(**options: object) -> ConvVAE:
    torch.manual_seed(0)
    return ConvVAE(ConvVAEConfig(**{**SMALL, **options}))  # type: ignore[arg-type]


def random_images(n: int, config: ConvVAEConfig) -> Tensor:
    shape = (n, config.channels, config.image_size, config.image_size)
    counts = torch.randint(0, config.levels, shape, generator=torch.Generator().manual_seed(1))
    return counts / (config.levels - 1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("trials", [1, 16, 255])
@pytest.mark.parametrize("spread", [-12.0, 0.0, 3.0, 1000.0])
def test_beta_binomial_probabilities_sum_to_one(trials: int, spread: float) -> None:
    counts = torch.arange(trials + 1.0)[:, None]
    logits = torch.linspace(-12, 12, 25)
    total = beta_binomial_log_prob(logits, torch.full_like(logits, spread), counts, trials).exp().sum(dim=0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-3)


@pytest.mark.parametrize("trials", [1, 16, 255])
def test_binomial_probabilities_sum_to_one(trials: int) -> None:
    counts = torch.arange(trials + 1.0)[:, None]
    total = binomial_log_prob(torch.linspace(-12, 12, 25), counts, trials).exp().sum(dim=0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-3)


def test_log_probabilities_agree_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    counts = torch.arange(17.0)[:, None]
    logits, spread = torch.linspace(-4, 4, 9), torch.linspace(-2, 20, 9)
    alpha, beta = beta_binomial_parameters(logits, spread)
    expected = stats.betabinom.logpmf(counts.numpy(), 16, alpha.double().numpy(), beta.double().numpy())
    ours = beta_binomial_log_prob(logits, spread, counts, 16).double()
    torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=1e-4, atol=1e-4)
    expected = stats.binom.logpmf(counts.numpy(), 16, torch.sigmoid(logits.double()).numpy())
    ours = binomial_log_prob(logits, counts, 16).double()
    torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


def test_bernoulli_is_binary_cross_entropy() -> None:
    logits, bits = torch.randn(50, generator=seeded(0)), torch.arange(50) % 2.0
    expected = -F.binary_cross_entropy_with_logits(logits, bits, reduction="none")
    torch.testing.assert_close(binomial_log_prob(logits, bits, 1), expected)


@pytest.mark.parametrize("likelihood", ["bernoulli", "beta-binomial"])
def test_elbo_is_a_lower_bound(likelihood: str) -> None:
    """The probabilities of all 65536 images of 4x4 bits sum to 1, so their lower bounds sum to at most 1."""
    model = small_model(image_size=4, levels=2, likelihood=likelihood, width=2)
    bits = (torch.arange(2**16)[:, None] >> torch.arange(16)) & 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=seeded(2)))
        out = model(bits.float().view(-1, 1, 4, 4), generator=seeded(0))
    total = torch.exp(-(out.nll + out.kl).double()).sum().item()
    assert 0.5 < total < 1.0


@pytest.mark.parametrize("likelihood", ["beta-binomial", "binomial", "bernoulli", "gaussian"])
def test_loss_is_the_mean_of_nll_and_weighted_kl(likelihood: str) -> None:
    model = small_model(likelihood=likelihood, levels=2 if likelihood == "bernoulli" else 17)
    images = random_images(5, model.config)
    full, half = model(images, generator=seeded(0)), model(images, beta=0.5, generator=seeded(0))
    assert full.nll.shape == full.kl.shape == (5,)
    torch.testing.assert_close(full.loss, (full.nll + full.kl).mean())
    torch.testing.assert_close(half.loss, (full.nll + 0.5 * full.kl).mean())
    assert (full.kl >= 0).all()


def test_free_bits_clamp_the_kl_per_channel() -> None:
    free_bits = 0.05
    plain, free = small_model(latent_dim=6), small_model(latent_dim=6, free_bits=free_bits)
    images = random_images(5, plain.config)
    for model in (plain, free):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=seeded(2)))
    a, b = plain(images, generator=seeded(0)), free(images, generator=seeded(0))
    mu, logvar = free.posterior(free._features(images)).chunk(2, dim=1)
    of_z = (0.5 * (logvar.exp() + mu.square() - 1 - logvar)).mean(0)
    torch.testing.assert_close(a.loss, (a.nll + a.kl).mean())
    details = b.kl.mean() - of_z.sum()
    least = of_z.clamp(min=free_bits).sum() + max(details, 2 * free_bits)  # two channels; their sum is at most theirs
    assert least - 1e-4 < b.loss - b.nll.mean() < least + 2 * free_bits
    assert of_z.clamp(min=free_bits).sum() > of_z.sum() + 1e-3


def test_beta_and_its_warmup_weight_the_kl() -> None:
    model = small_model(beta=3.0, kl_warmup=10)
    batch = {"images": random_images(4, model.config)}
    for step, weight in ((5, 1.5), (99, 3.0)):
        values = model.loss("model", batch, StepContext(step, 100))
        torch.testing.assert_close(values["loss"], values["nll"] + weight * values["kl"])


def test_attention_is_initialized_as_the_identity_and_is_global() -> None:
    plain, attentive = small_model(image_size=16), small_model(image_size=16, attention=True)
    features = torch.randn(1, 16, 4, 4, generator=seeded(0))
    block = attentive.encoder[-1]
    assert sum(p.numel() for p in attentive.parameters()) > sum(p.numel() for p in plain.parameters())
    torch.testing.assert_close(block(features), features)
    torch.nn.init.ones_(block.out.weight)
    moved = features.clone()
    moved[..., 0, 0] += torch.randn(16, generator=seeded(1))
    assert (block(moved) - block(features))[..., 3, 3].abs().min() > 1e-4


def test_training_steps_lower_the_loss() -> None:
    model = small_model(width=8)
    images = random_images(1, model.config).repeat(16, 1, 1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = model(images, generator=seeded(0)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("size", [4, 7, 8, 20, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_image_sizes(size: int, channels: int) -> None:
    model = small_model(image_size=size, channels=channels, levels=256)
    images = random_images(2, model.config)
    assert torch.isfinite(model(images).loss)
    assert model.reconstruct(images).shape == model.sample(2).shape == images.shape


@pytest.mark.parametrize("size", [0, 2, 9, 30, 100])
def test_other_image_sizes_are_rejected(size: int) -> None:
    with pytest.raises(ValueError, match=rf"image_size: expected .* got {size}"):
        ConvVAEConfig(image_size=size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": 0}, "latent_dim: expected a positive integer, got 0"),
        ({"width": -3}, "width: expected a positive integer, got -3"),
        ({"channels": 1.5}, "channels: expected a positive integer, got 1.5"),
        ({"levels": 1}, "levels: expected an integer >= 2, got 1"),
        ({"likelihood": "poisson"}, "likelihood: expected one of .* got 'poisson'"),
        ({"free_bits": -1.0}, "free_bits: expected a number >= 0, got -1.0"),
        ({"beta": float("nan")}, "beta: expected a number >= 0, got nan"),
        ({"likelihood": "bernoulli"}, "levels: expected 2 with likelihood 'bernoulli', got 17"),
    ],
)
def test_invalid_configs_raise_an_error_that_names_the_option(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvVAEConfig(**options)  # type: ignore[arg-type]


def test_images_of_another_shape_or_dtype_are_rejected() -> None:
    model = small_model()
    with pytest.raises(ValueError, match=r"images: expected shape \(B, C, S, S\) = \(2, 1, 8, 8\), got \(2, 3, 8, 8\)"):
        model(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="images: expected shape"):
        model.reconstruct(torch.zeros(1, 8, 8))
    with pytest.raises(TypeError, match=r"images: expected a floating-point tensor, got torch\.uint8"):
        model(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


def test_reconstructions_are_deterministic() -> None:
    model = small_model()
    images = random_images(3, model.config)
    assert torch.equal(model.reconstruct(images), model.reconstruct(images))


def test_the_posterior_of_the_details_is_initialized_at_their_prior() -> None:
    model = small_model()
    images = random_images(4, model.config)
    features = model.encoder(2 * images - 1)
    _, kl_of_z = GaussianLatent()(model.posterior(features))
    torch.testing.assert_close(model(images).kl, kl_of_z)


def test_gaussian_latent_samples_the_halves_of_its_input() -> None:
    h = torch.randn(3, 8, 2, 2, generator=seeded(0), requires_grad=True)
    layer = GaussianLatent()
    z, kl = layer(h, generator=seeded(1))
    expected_z, expected_kl = functional.reparameterize_kl(h[:, :4], h[:, 4:], generator=seeded(1))
    assert z.shape == (3, 4, 2, 2)
    assert kl.shape == (3,)
    assert torch.equal(z, expected_z)
    assert torch.equal(kl, expected_kl)
    assert not list(layer.parameters())


def test_gaussian_latent_samples_in_eval_mode_too() -> None:
    layer = GaussianLatent().eval()
    h = torch.zeros(2, 8)
    samples = [layer(h, generator=seeded(seed))[0] for seed in range(3)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(samples, 2))


@pytest.mark.parametrize("shape", [(2, 7), (2, 0), (4,), (2, 3, 4)])
def test_gaussian_latent_rejects_an_odd_number_of_channels(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"h: expected \(B, 2L, \*\), an even number of channels in dim 1, got"):
        GaussianLatent()(torch.zeros(shape))


def test_latents_are_decoded_with_the_mean_of_the_details_by_default() -> None:
    model = small_model()
    mu, logvar, detail_mu, detail_logvar = model.encode(random_images(3, model.config))
    assert mu.shape == logvar.shape == (3, model.config.latent_dim)
    size = model.config.coarse_size
    assert detail_mu.shape == detail_logvar.shape == (3, model.config.detail_channels, size, size)
    torch.testing.assert_close(model.decode(mu), model.decode(mu, torch.zeros_like(detail_mu)))  # their initial prior


def test_examples_in_docstrings_run() -> None:
    results = doctest.testmod(conv_vae, extraglobs={"torch": torch})
    assert results.attempted
    assert results.failed == 0
