"""The VQ-VAE: codebook, autoencoder and prior."""

from __future__ import annotations

import doctest
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.models import recompute_buffers, recomputed_buffers, vq_vae
from fastgen.models.base import Images, StepContext, from_data
from fastgen.models.vq_vae import VQVAE, CodeOptions, VQVAEConfig

NOW = StepContext(1, 10)
PHASES = ("autoencoder", "prior")


def small_model(**options: Any) -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(VQVAEConfig(**{"width": 4, "code_dim": 3, "codebook_size": 7, "prior_width": 8, **options}))


def random_images(n: int, config: VQVAEConfig) -> Tensor:
    shape = (n, config.channels, config.image_size, config.image_size)
    return torch.randint(0, config.levels, shape, generator=seeded(1)) / (config.levels - 1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def train(
    model: VQVAE, images: Tensor, steps: int, phases: tuple[str, ...] = PHASES, rate: float = 1e-2
) -> list[dict[str, float]]:
    """Train the phases; returns the losses of every step."""
    optimizers = {
        phase.name: torch.optim.AdamW(
            itertools.chain(*(model.get_submodule(n).parameters() for n in phase.networks)), rate
        )
        for phase in model.phases()
        if phase.name in phases
    }
    history = []
    for number in range(steps):
        values = {}
        for name, optimizer in optimizers.items():
            torch.manual_seed(number)
            loss = model.loss(name, {"images": images}, NOW)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values[name] = loss.item()
        history.append(values)
    return history


@pytest.mark.parametrize(
    ("size", "channels", "num_downsamples", "likelihood"),
    [(8, 1, 2, "beta-binomial"), (6, 3, 1, "gaussian"), (20, 2, 2, "binomial"), (16, 1, 3, "beta-binomial")],
)
def test_codes_samples_and_reconstructions_have_the_shape_of_the_images(
    size: int, channels: int, num_downsamples: int, likelihood: str
) -> None:
    model = small_model(image_size=size, channels=channels, num_downsamples=num_downsamples, likelihood=likelihood)
    images = random_images(5, model.config)
    codes = model.encode(images)
    assert codes.shape == (5, size >> num_downsamples, size >> num_downsamples)
    samples = model.draw(4, CodeOptions())
    assert isinstance(samples, Images)
    assert samples.pixels.shape == (4, *images.shape[1:])
    assert model.visualize({"images": images})["reconstructions"].pixels.shape == (10, *images.shape[1:])


def test_the_phases_train_every_parameter() -> None:
    model = small_model(learning_rate=1e-4, prior_learning_rate=2e-4)
    first, second = model.phases()
    assert (first.networks, second.networks) == (("autoencoder.encoder", "autoencoder.decoder"), ("prior",))
    assert (first.learning_rate, second.learning_rate) == (1e-4, 2e-4)
    updated = {
        f"{name}.{key}"
        for p in (first, second)
        for name in p.networks
        for key, _ in model.get_submodule(name).named_parameters()
    }
    assert updated == {name for name, _ in model.named_parameters()}


def test_features_are_quantized_to_the_nearest_entry() -> None:
    model = small_model()
    features = torch.randn(4, 3, 2, 2, generator=seeded(0))
    rows, entries = features.movedim(1, -1).reshape(-1, 3), model.autoencoder.codebook.words
    expected = torch.cdist(rows[None], entries[None])[0].argmin(1)
    codes = model.autoencoder.codebook.nearest(features)
    assert torch.equal(codes.flatten(), expected)
    torch.testing.assert_close(
        model.autoencoder.codebook.look_up(codes).movedim(1, -1).reshape(-1, 3), entries[expected]
    )


def test_entries_are_running_means_of_their_features() -> None:
    model = small_model(codebook_decay=0.9, revive_below=0.0)
    codebook = model.autoencoder.codebook
    uses, sums = torch.zeros(7), torch.zeros(7, 3)
    for number in range(4):
        features = torch.randn(5, 3, 2, 2, generator=seeded(number))
        codes = codebook.nearest(features)
        before = codebook.words.clone()
        codebook.update(features, codes)
        for code in range(7):
            rows = features.movedim(1, -1).reshape(-1, 3)[codes.flatten() == code]
            uses[code] = 0.9 * uses[code] + 0.1 * len(rows)
            sums[code] = 0.9 * sums[code] + 0.1 * rows.sum(0)
            expected = sums[code] / uses[code] if uses[code] > 0 else before[code]
            torch.testing.assert_close(codebook.words[code], expected)
    torch.testing.assert_close(codebook.uses, uses)


def test_unused_entries_are_reset_to_features_of_the_batch() -> None:
    model = small_model(revive_below=0.5)
    codebook = model.autoencoder.codebook
    with torch.no_grad():
        codebook.words.fill_(100.0)
        codebook.words[0] = 0.0
        codebook.uses.copy_(torch.tensor([20.0, 3.0, 0, 0, 0, 0, 0]))
        codebook.sums.copy_(codebook.uses[:, None] * codebook.words)
    features = torch.randn(5, 3, 2, 2, generator=seeded(0))
    torch.manual_seed(4)
    codebook.update(features, codebook.nearest(features))
    rows = features.movedim(1, -1).reshape(-1, 3)
    assert torch.equal(codebook.words[1], torch.full((3,), 100.0))  # 3 is above half of 20 / 7
    distances = torch.cdist(codebook.words[2:], rows)
    assert (distances.min(1).values < 1e-5).all()
    torch.testing.assert_close(codebook.uses[2:], torch.full((5,), 20 / 7))
    moved = codebook.words.clone()
    other = small_model(revive_below=0.5).autoencoder.codebook
    with torch.no_grad():
        other.words.fill_(100.0)
        other.words[0] = 0.0
        other.uses.copy_(torch.tensor([20.0, 3.0, 0, 0, 0, 0, 0]))
        other.sums.copy_(other.uses[:, None] * other.words)
    torch.manual_seed(4)  # the same noise gives the same entries, as in a resumed run
    other.update(features, other.nearest(features))
    assert torch.equal(other.words, moved)


def test_the_gradient_of_the_quantization_is_straight_through() -> None:
    model = small_model(commitment=0.0).eval()
    images = random_images(3, model.config)
    features = model.autoencoder._features(images)
    entries = model.autoencoder.codebook.look_up(model.autoencoder.codebook.nearest(features)).requires_grad_()
    (behind,) = torch.autograd.grad(-model.autoencoder._log_prob(entries, images).mean(), entries)
    expected = torch.autograd.grad(features, list(model.autoencoder.encoder.parameters()), behind)
    loss = model.loss("autoencoder", {"images": images}, NOW)["loss"]
    for ours, theirs in zip(
        torch.autograd.grad(loss, list(model.autoencoder.encoder.parameters())), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_codebook_is_updated_only_in_training_of_the_autoencoder() -> None:
    model = small_model()
    images = random_images(8, model.config)
    for phase, training, updates in (
        ("prior", True, False),
        ("autoencoder", False, False),
        ("autoencoder", True, True),
    ):
        before = model.autoencoder.codebook.words.clone()
        model.train(training).loss(phase, {"images": images}, NOW)
        assert torch.equal(model.autoencoder.codebook.words, before) != updates


def test_perplexity_is_the_effective_number_of_entries() -> None:
    codebook = small_model().autoencoder.codebook
    for uses, expected in (([1.0] * 7, 7.0), ([5.0, 5, 0, 0, 0, 0, 0], 2.0), ([3.0, 0, 0, 0, 0, 0, 0], 1.0)):
        codebook.uses.copy_(torch.tensor(uses))
        assert abs(codebook.perplexity().item() - expected) < 1e-3


def test_the_prior_is_normalized_and_samples_its_distribution() -> None:
    model = small_model(codebook_size=3, num_downsamples=2).eval()  # 81 maps of 4 codes
    maps = torch.cartesian_prod(*[torch.arange(3)] * 4)
    with torch.no_grad():
        for parameter in model.prior.parameters():
            parameter.mul_(2.0)
        probabilities = (-model.prior(maps)).exp()
    torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0))
    with torch.no_grad():
        samples = model.prior.sample(20_000, 1.0, seeded(0))
    number = (samples * torch.tensor([27, 9, 3, 1])).sum(1)
    counts = torch.bincount(number, minlength=81) / 20_000
    assert (counts - probabilities).abs().max() < 5 * (probabilities.max() / 20_000).sqrt()
    likeliest = model.prior.sample(2, 0.0, None)
    assert torch.equal(likeliest[0], likeliest[1])


def test_elbo_is_a_lower_bound() -> None:
    """The lower bounds of the probabilities of all 4096 images of 2x2 pixels of 8 levels sum to at most 1."""
    model = small_model(image_size=2, num_downsamples=1, levels=8).eval()
    images = torch.cartesian_prod(*[torch.arange(8.0)] * 4).view(-1, 1, 2, 2) / 7
    scores = model.score({"images": images})
    torch.testing.assert_close(scores["elbo"], -scores["nll"] - scores["kl"])
    assert scores["elbo"].double().exp().sum() < 1.0
    assert (scores["kl"] > 0).all()
    expected = (model.decode(model.encode(images)) - images).square().mean((1, 2, 3))
    torch.testing.assert_close(scores["squared error"], expected)
    assert scores["codebook perplexity"].shape == expected.shape


def test_forward_is_the_loss_of_both_phases() -> None:
    model = small_model().eval()
    images = random_images(3, model.config)
    out = model(images)
    losses = [model.loss(phase, {"images": images}, NOW)["loss"] for phase in PHASES]
    torch.testing.assert_close(out.loss, sum(losses))
    scores = model.score({"images": images})
    torch.testing.assert_close(out.nll, scores["nll"])
    torch.testing.assert_close(out.kl, scores["kl"])
    for samples in (1, 3):
        torch.testing.assert_close(model.elbo(images, samples=samples), scores["elbo"])
    with pytest.raises(ValueError, match="samples: expected a positive integer, got 0"):
        model.elbo(images, samples=0)


def test_steps_of_both_phases_lower_their_losses_on_a_fixed_batch() -> None:
    model = small_model(width=8, codebook_size=4)
    images = (random_images(2, model.config) > 0.5).float().repeat(8, 1, 1, 1)
    history = train(model, images, 30, PHASES[:1])
    assert history[-1]["autoencoder"] < 0.75 * history[0]["autoencoder"]
    history = train(model.eval(), images, 60, PHASES[1:])
    assert history[-1]["prior"] < 0.4 * history[0]["prior"]
    known = {tuple(row) for row in model.encode(images).flatten(1).tolist()}
    samples = model.prior.sample(64, 1.0, seeded(0)).tolist()  # the maps of the data
    assert sum(tuple(row) in known for row in samples) > 45


CONFIG_ERRORS = {
    "no size": ({"image_size": 0}, "image_size: expected a positive integer, got 0"),
    "an odd size": ({"image_size": 10}, "image_size: expected a multiple of 4, as num_downsamples = 2, got 10"),
    "no downsampling": ({"num_downsamples": 0}, "num_downsamples: expected a positive integer, got 0"),
    "one entry": ({"codebook_size": 1}, "codebook_size: expected at least 2, got 1"),
    "one level": ({"levels": 1}, "levels: expected an integer >= 2, got 1"),
    "an unknown likelihood": ({"likelihood": "flat"}, "likelihood: expected one of .*, got 'flat'"),
    "a decay of 1": ({"codebook_decay": 1.0}, r"codebook_decay: expected a number in \[0, 1\), got 1.0"),
    "revival of all": ({"revive_below": 1.0}, r"revive_below: expected a number in \[0, 1\), got 1.0"),
    "a negative weight": ({"commitment": -1.0}, "commitment: expected a number >= 0, got -1.0"),
    "a learning rate of 0": ({"prior_learning_rate": 0.0}, "prior_learning_rate: expected a positive number, got 0.0"),
}


@pytest.mark.parametrize("mistake", CONFIG_ERRORS)
def test_invalid_configs_raise_an_error_that_names_the_option(mistake: str) -> None:
    options, message = CONFIG_ERRORS[mistake]
    with pytest.raises(ValueError, match=f"^{message}"):
        VQVAEConfig(**options)  # type: ignore[arg-type]
    assert from_data(VQVAEConfig) == ["image_size", "channels", "levels"]


def test_invalid_images_and_codes_raise_an_error() -> None:
    model = small_model()
    with pytest.raises(ValueError, match=r"images: expected shape \(B, C, S, S\) = \(2, 1, 8, 8\), got \(2, 3, 8, 8\)"):
        model.encode(torch.zeros(2, 3, 8, 8))
    with pytest.raises(TypeError, match=r"codes: expected an int64 tensor, got torch\.float32"):
        model.decode(torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match=r"codes: expected shape \(B, h, w\) = \(2, 2, 2\), got \(2, 4\)"):
        model.decode(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="codes: expected integers from 0 to 6, got 0 to 7"):
        model.decode(torch.tensor([[[0, 7], [1, 1]]]))
    with pytest.raises(ValueError, match="temperature: expected a number >= 0, got -1"):
        CodeOptions(temperature=-1)


def test_examples_in_docstrings_run() -> None:
    results = doctest.testmod(vq_vae, extraglobs={"torch": torch})
    assert results.attempted
    assert results.failed == 0


def test_averaged_codebooks_compute_their_entries_from_the_running_averages() -> None:
    book = VQVAE(VQVAEConfig(image_size=8, codebook_size=3, code_dim=2)).autoencoder.codebook
    book.uses.copy_(torch.tensor([2.0, 0.0, 0.5]))
    book.sums.copy_(torch.tensor([[2.0, 4.0], [7.0, 7.0], [1.0, 1.5]]))
    before = book.words.clone()
    expected = torch.stack([torch.tensor([1.0, 2.0]), before[1], torch.tensor([2.0, 3.0])])  # one that is unused stays
    with recomputed_buffers(book):
        assert torch.equal(book.words, expected)
    assert torch.equal(book.words, before)
    recompute_buffers(book)
    assert torch.equal(book.words, expected)
