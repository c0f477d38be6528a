"""Variational autoencoders with fully connected layers: vae, cvae, flow-vae."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.models import MODELS as ZOO
from fastgen.models import create_model, cvae, flow_vae, vae
from fastgen.models.base import Images, StepContext, from_data
from fastgen.models.conditioning import LabelOptions
from fastgen.models.cvae import CVAE, CVAEConfig
from fastgen.models.flow_vae import FlowVAE, FlowVAEConfig, InverseAutoregressiveFlow, planar
from fastgen.models.vae import VAE, VAEConfig
from fastgen.models.variational import (
    Bound,
    VariationalAutoencoder,
    gaussian_log_prob,
    pixels_log_prob,
    pixels_mean,
)

NOW = StepContext(500, 1000)
CLASSES = 3
MODELS: dict[str, tuple[type[VariationalAutoencoder], type, dict[str, Any]]] = {
    "vae": (VAE, VAEConfig, {}),
    "vae, free bits": (VAE, VAEConfig, {"free_bits": 0.1}),
    "vae, gaussian": (VAE, VAEConfig, {"likelihood": "gaussian"}),
    "cvae": (CVAE, CVAEConfig, {"classes": CLASSES, "label_dim": 5}),
    "flow-vae": (FlowVAE, FlowVAEConfig, {"flow_width": 7, "context_dim": 3, "flows": 2}),
    "flow-vae, planar": (FlowVAE, FlowVAEConfig, {"flow": "planar", "flows": 3}),
}


def small_model(which: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model_class, config_class, own = MODELS[which]
    return model_class(config_class(**{"width": 16, "latent_dim": 4, **own, **options}))


def random_batch(n: int, config: Any) -> dict[str, Tensor]:
    shape = (n, config.channels, config.image_size, config.image_size)
    counts = torch.randint(0, config.levels, shape, generator=seeded(1))
    return {"images": counts / (config.levels - 1), "labels": torch.arange(n) % CLASSES}


def bound(model: Any, batch: dict[str, Tensor], **options: Any) -> Bound:
    return model(batch["images"], *model.conditions(batch), **options)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def perturbed(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded(2)))
    return model


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_gaussian_probabilities_sum_to_one_and_have_finite_gradients(levels: int) -> None:
    logits = torch.linspace(-12, 12, 25).requires_grad_()
    counts = torch.arange(float(levels))[:, None]
    for log_std in (-9.0, -3.0, 0.0, 5.0):
        spread = torch.full_like(logits, log_std).requires_grad_()
        log_prob = gaussian_log_prob(logits, spread, counts, levels)
        torch.testing.assert_close(log_prob.exp().sum(0), torch.ones(25), rtol=0, atol=1e-3)
        for gradient in torch.autograd.grad(log_prob.sum(), (logits, spread)):
            assert torch.isfinite(gradient).all()


def test_gaussian_probabilities_match_the_normal_distribution() -> None:
    counts, logits = torch.arange(9.0).double(), torch.linspace(-3, 3, 9).double()
    normal = torch.distributions.Normal(torch.sigmoid(logits), torch.tensor(0.2).double())
    high, low = normal.cdf((counts + 0.5) / 8), normal.cdf((counts - 0.5) / 8)
    expected = torch.where(counts == 0, high, torch.where(counts == 8, 1 - low, high - low)).log()
    log_std = torch.full_like(logits, 1.0 + torch.tensor(0.2).log().item())
    torch.testing.assert_close(gaussian_log_prob(logits, log_std, counts, 9), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("likelihood", ["gaussian", "beta-binomial", "binomial"])
def test_expected_pixels_are_between_0_and_1(likelihood: str) -> None:
    parameters = torch.randn(2, 6 if likelihood != "binomial" else 3, 5, 5, generator=seeded(0))
    mean = pixels_mean(parameters, likelihood)
    assert mean.shape == (2, 3, 5, 5)
    assert ((mean > 0) & (mean < 1)).all()
    assert pixels_log_prob(parameters, mean.round(), likelihood, 17).shape == (2,)


@pytest.mark.parametrize("name", ["vae", "cvae", "conv-vae", "flow-vae"])
def test_latents_of_another_size_are_named(name: str) -> None:
    model = create_model(name, width=4)
    labels = (torch.tensor([0, 1, 2]),) if name == "cvae" else ()
    expected = model.config.latent_dim
    with pytest.raises(ValueError, match=rf"z: expected shape \(B, latent_dim\) = \(3, {expected}\), got \(3, 5\)"):
        model.decode(torch.rand(3, 5), *labels)
    z = torch.rand(3, expected)
    if labels:
        with pytest.raises(ValueError, match="labels: expected"):
            model.decode(z, labels[0] + 8)
    if name == "conv-vae":
        with pytest.raises(ValueError, match="details: expected shape"):
            model.decode(z, torch.rand(3, 1, 4, 4))


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (5, 3)], ids=["8", "5, color"])
def test_bounds_samples_and_reconstructions_have_the_shape_of_the_images(which: str, size: int, channels: int) -> None:
    model = perturbed(small_model(which, image_size=size, channels=channels))
    batch = random_batch(7, model.config)
    out = bound(model, batch)
    assert out.nll.shape == out.kl.shape == model.log_weights(batch).shape == (7,)
    samples = model.draw(5, model.sampling_class())
    assert isinstance(samples, Images)
    assert samples.pixels.shape == (5, channels, size, size)
    shown = model.visualize(batch)
    assert shown["reconstructions"].pixels.shape == (14, channels, size, size)


@pytest.mark.parametrize("name", ["vae", "cvae", "conv-vae", "flow-vae", "vq-vae"])
def test_all_autoencoders_have_the_same_methods(name: str) -> None:
    torch.manual_seed(0)
    model: Any = ZOO[name](ZOO[name].config_class(width=8)).eval()
    images = random_batch(4, model.config)["images"]
    labels = [torch.arange(4) % CLASSES] if name == "cvae" else []
    latent = model.encode(images, *labels)
    code = latent if name == "vq-vae" else latent[0]
    assert code.shape[0] == 4
    for pixels in (model.decode(code, *labels), model.reconstruct(images, *labels)):
        assert pixels.shape == images.shape
        assert 0 <= pixels.min() <= pixels.max() <= 1
    for samples in (1, 3):
        bounds = [model.elbo(images, *labels, samples=samples, generator=seeded(seed)) for seed in (0, 0)]
        assert bounds[0].shape == (4,)
        assert torch.equal(*bounds)
    out = model(images, *labels)
    assert out.loss.shape == ()
    assert out.nll.shape == out.kl.shape == (4,)


@pytest.mark.parametrize("which", MODELS)
def test_training_steps_lower_the_loss(which: str) -> None:
    model = small_model(which)
    batch = {
        name: tensor[:1].repeat(16, *[1] * (tensor.dim() - 1)) for name, tensor in random_batch(1, model.config).items()
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    values = []
    for _ in range(25):
        torch.manual_seed(3)
        loss = model.loss("model", batch, NOW)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize("which", ["vae", "cvae", "flow-vae", "flow-vae, planar"])
def test_beta_and_its_warmup_weight_the_kl(which: str) -> None:
    model = perturbed(small_model(which, beta=3.0, kl_warmup=10))
    batch = random_batch(6, model.config)
    for step, weight in ((1, 0.3), (5, 1.5), (10, 3.0), (99, 3.0)):
        torch.manual_seed(step)
        values = model.loss("model", batch, StepContext(step, 100))
        torch.testing.assert_close(values["loss"], values["nll"] + weight * values["kl"])
    scores = model.score(batch, generator=seeded(0))
    torch.testing.assert_close(scores["elbo"], -scores["nll"] - scores["kl"])


@pytest.mark.parametrize("which", ["vae", "cvae"])
def test_free_bits_clamp_the_kl_per_latent_dimension(which: str) -> None:
    plain, free = perturbed(small_model(which)), perturbed(small_model(which, free_bits=0.08))
    batch = random_batch(6, plain.config)
    mu, logvar = free.encode(batch["images"], *free.conditions(batch))
    kl = (0.5 * (logvar.exp() + mu.square() - 1 - logvar)).mean(0)
    assert len(kl) > (kl < 0.08).sum() > 0
    a, b = (bound(model, batch, generator=seeded(0)) for model in (plain, free))
    torch.testing.assert_close(a.kl, b.kl)
    torch.testing.assert_close(a.loss, (a.nll + a.kl).mean())
    torch.testing.assert_close(b.loss - b.nll.mean(), kl.clamp(min=0.08).sum())


def test_free_bits_of_a_flow_clamp_the_total_kl() -> None:
    free = perturbed(small_model("flow-vae"))
    batch = random_batch(6, free.config)
    kl = bound(free, batch, generator=seeded(0)).kl.detach().mean()
    for each, expected in ((float(kl) / 8, kl), (float(kl), 4 * kl)):
        model = perturbed(small_model("flow-vae", free_bits=each))
        out = bound(model, batch, beta=2.0, generator=seeded(0))
        torch.testing.assert_close(out.loss - out.nll.mean(), 2 * expected)


@pytest.mark.parametrize("which", MODELS)
def test_the_importance_weighted_bound_is_tighter_than_the_elbo(which: str) -> None:
    model = perturbed(small_model(which, image_size=3, levels=4))
    batch = {name: tensor[:1].expand(600, *tensor.shape[1:]) for name, tensor in random_batch(2, model.config).items()}
    weights = model.log_weights(batch, generator=seeded(0)).double()
    elbo = model.score(batch, generator=seeded(1))["elbo"].double()
    spread = (weights.std() + elbo.std()) / 600**0.5
    assert abs(weights.mean() - elbo.mean()) < 4 * spread
    # p(x), estimated with samples of the prior
    z = torch.randn(20_000, model.config.latent_dim, generator=seeded(2))
    image = batch["images"][:1]
    with torch.no_grad():
        labels = [torch.zeros(len(z), dtype=torch.int64)] if "cvae" in which else []
        parameters = model._pixel_parameters(z, *labels)
        log_prob = model.log_likelihood(parameters, image.expand(len(z), -1, -1, -1)).double()
    log_p = log_prob.logsumexp(0) - torch.tensor(float(len(z))).log()
    iwae = weights.logsumexp(0) - torch.tensor(600.0).log()
    assert elbo.mean() < iwae + 0.05
    few = {name: tensor[:5] for name, tensor in batch.items()}
    labels = model.conditions(few)
    torch.testing.assert_close(
        model.elbo(few["images"], *labels, generator=seeded(3)), model.score(few, generator=seeded(3))["elbo"]
    )
    many = model.elbo(few["images"], *labels, samples=200, generator=seeded(4))
    assert many.shape == (5,)
    assert (many.double() - log_p).abs().max() < 0.5
    assert abs(iwae - log_p) < 0.5


def test_samples_have_the_requested_labels() -> None:
    """Every class has one image, which does not depend on z."""
    model = small_model("cvae", latent_dim=2)
    batch = random_batch(CLASSES, model.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    many = {name: tensor.repeat(8, *[1] * (tensor.dim() - 1)) for name, tensor in batch.items()}
    for _ in range(150):
        loss = model.loss("model", many, NOW)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for label in range(CLASSES):
        samples = model.draw(8, LabelOptions(label=label), generator=seeded(0)).pixels
        errors = (samples[:, None] - batch["images"][None]).abs().mean((2, 3, 4))
        assert (errors.argmin(1) == label).all()
    in_turn = model.draw(2 * CLASSES, LabelOptions(), generator=seeded(0))
    assert in_turn.columns == CLASSES
    errors = (in_turn.pixels[:, None] - batch["images"][None]).abs().mean((2, 3, 4))
    assert errors.argmin(1).tolist() == [0, 1, 2, 0, 1, 2]
    assert model.visualize(batch)["styles"].pixels.shape == (CLASSES * (CLASSES + 1), 1, 8, 8)


def test_invalid_labels_raise_an_error() -> None:
    model = small_model("cvae")
    images = random_batch(4, model.config)["images"]
    for labels, error, message in (
        (None, ValueError, r"labels: expected \(B,\) int64, got a batch without labels"),
        (torch.zeros(4), TypeError, r"labels: expected an int64 tensor, got torch\.float32"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"labels: expected shape \(B,\) = \(4,\), got \(3,\)"),
    ):
        batch = {"images": images} if labels is None else {"images": images, "labels": labels}
        with pytest.raises(error, match=message):
            bound(model, batch)
    with pytest.raises(ValueError, match="label: expected -1 or a class below 3, got 3"):
        model.draw(2, LabelOptions(label=3))
    with pytest.raises(ValueError, match=r"label: expected a class .* or -1 for all in turn, got -2"):
        LabelOptions(label=-2)


@pytest.mark.parametrize("dim", [2, 5])
def test_planar_flows_are_invertible_and_return_the_log_determinant(dim: int) -> None:
    z = torch.randn(50, dim, generator=seeded(0)).double()
    parameters = 4 * torch.randn(50, 2 * dim + 1, generator=seeded(1)).double()
    _, log_det = planar(z, parameters)
    for i in range(50):
        jacobian = torch.autograd.functional.jacobian(lambda x, i=i: planar(x[None], parameters[i : i + 1])[0][0], z[i])
        sign, expected = torch.linalg.slogdet(jacobian)
        assert sign == 1
        torch.testing.assert_close(log_det[i], expected)
    outputs, _ = planar(torch.zeros(2, dim).double(), torch.zeros(2, 2 * dim + 1).double())
    assert torch.isfinite(outputs).all()  # w = 0


@pytest.mark.parametrize(("dim", "width"), [(2, 3), (5, 4), (5, 16)])
def test_inverse_autoregressive_flows_are_triangular_and_return_the_log_determinant(dim: int, width: int) -> None:
    torch.manual_seed(0)
    flow = perturbed(InverseAutoregressiveFlow(dim, width, 3)).double()
    z, context = torch.randn(dim, generator=seeded(0)).double(), torch.randn(1, 3, generator=seeded(1)).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x[None], context)[0][0], z)
    assert torch.equal(jacobian, jacobian.tril())
    below = jacobian.tril(-1).abs().sum(1)[1:]
    assert (below > 0).all()  # every dimension but the first depends on those before it
    _, log_det = flow(z[None], context)
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian)[1])


@pytest.mark.parametrize("which", ["flow-vae", "flow-vae, planar"])
def test_a_chain_of_flows_sums_the_log_determinants(which: str) -> None:
    model = perturbed(small_model(which)).double()
    z = torch.randn(1, 4, generator=seeded(0)).double()
    parameters = torch.randn(1, model.config.context_size, generator=seeded(1)).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: model.flow(x[None], parameters)[0][0], z[0])
    torch.testing.assert_close(model.flow(z, parameters)[1][0], torch.linalg.slogdet(jacobian)[1])


CONFIG_ERRORS: dict[str, tuple[type, dict[str, Any], str]] = {
    "no latent": (VAEConfig, {"latent_dim": 0}, "latent_dim: expected a positive integer, got 0"),
    "a depth of True": (VAEConfig, {"depth": True}, "depth: expected a positive integer, got True"),
    "one level": (VAEConfig, {"levels": 1}, "levels: expected an integer >= 2, got 1"),
    "too many levels": (
        VAEConfig,
        {"likelihood": "bernoulli"},
        "levels: expected 2 with likelihood 'bernoulli', got 17",
    ),
    "an unknown likelihood": (VAEConfig, {"likelihood": "poisson"}, "likelihood: expected one of .*, got 'poisson'"),
    "a negative beta": (VAEConfig, {"beta": -1.0}, "beta: expected a number >= 0, got -1.0"),
    "negative free bits": (VAEConfig, {"free_bits": -0.5}, "free_bits: expected a number >= 0, got -0.5"),
    "a negative warm-up": (VAEConfig, {"kl_warmup": -1}, "kl_warmup: expected a number of steps >= 0, got -1"),
    "a learning rate of 0": (VAEConfig, {"learning_rate": 0.0}, "learning_rate: expected a positive number, got 0.0"),
    "no labels": (
        CVAEConfig,
        {"classes": 0},
        r"classes: expected 2 or more \(vae takes .* labels\), got 0",
    ),
    "one class": (CVAEConfig, {"classes": 1}, "classes: expected 2 or more .*, got 1"),
    "no label": (CVAEConfig, {"label_dim": 0}, "label_dim: expected a positive integer, got 0"),
    "no flows": (FlowVAEConfig, {"flows": 0}, "flows: expected a positive integer, got 0"),
    "an unknown flow": (FlowVAEConfig, {"flow": "radial"}, "flow: expected one of .*, got 'radial'"),
    "one dimension": (
        FlowVAEConfig,
        {"latent_dim": 1},
        "latent_dim: expected at least 2 with inverse .*, got 1",
    ),
}


@pytest.mark.parametrize("mistake", CONFIG_ERRORS)
def test_invalid_configs_raise_an_error_that_names_the_option(mistake: str) -> None:
    config_class, options, message = CONFIG_ERRORS[mistake]
    with pytest.raises(ValueError, match=f"^{message}"):
        config_class(**options)


def test_sizes_levels_and_classes_come_from_the_data() -> None:
    assert from_data(VAEConfig) == from_data(FlowVAEConfig) == ["image_size", "channels", "levels"]
    assert from_data(CVAEConfig) == ["image_size", "channels", "levels", "classes"]


@pytest.mark.parametrize("which", ["vae", "cvae", "flow-vae"])
def test_invalid_images_raise_an_error(which: str) -> None:
    model = small_model(which)
    batch = random_batch(2, model.config)
    labels = model.conditions(batch)
    for method in (model, model.encode, model.reconstruct, model.log_weight, model.elbo):
        with pytest.raises(
            ValueError, match=r"images: expected shape \(B, C, S, S\) = \(2, 1, 8, 8\), got \(2, 3, 8, 8\)"
        ):
            method(torch.zeros(2, 3, 8, 8), *labels)
    with pytest.raises(ValueError, match="samples: expected a positive integer, got 0"):
        model.elbo(batch["images"], *labels, samples=0)
    with pytest.raises(TypeError, match="images: expected a floating-point tensor"):
        bound(model, batch | {"images": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)})


@pytest.mark.parametrize("which", MODELS)
def test_reconstructions_are_deterministic_and_scores_depend_on_the_generator_alone(which: str) -> None:
    model = small_model(which)
    batch = random_batch(4, model.config)
    images, labels = batch["images"], model.conditions(batch)
    assert torch.equal(model.reconstruct(images, *labels), model.reconstruct(images, *labels))
    scores = [model.score(batch, generator=seeded(s))["elbo"] for s in (1, 1, 2)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_a_bernoulli_vae_has_the_binary_cross_entropy() -> None:
    model = small_model("vae", likelihood="bernoulli", levels=2)
    batch = random_batch(3, model.config)
    out = bound(model, batch, generator=seeded(0))
    logits = model._pixel_parameters(torch.zeros(3, 4))
    expected = F.binary_cross_entropy_with_logits(logits, batch["images"], reduction="none").flatten(1).sum(1)
    torch.testing.assert_close(-model.log_likelihood(logits, batch["images"]), expected)
    assert (out.nll > 0).all()


@pytest.mark.parametrize("module", [vae, cvae, flow_vae], ids=["vae", "cvae", "flow-vae"])
def test_examples_in_docstrings_run(module: Any) -> None:
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted
    assert results.failed == 0
