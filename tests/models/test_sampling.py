"""Sampling tokens from logits: extreme temperatures, ties, infinities, NaN, low precision."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from torch import Tensor

from fastgen.models import (
    VQVAE,
    ImageTransformer,
    ImageTransformerConfig,
    RecurrentGAN,
    RecurrentGANConfig,
    Seq2Seq,
    Seq2SeqConfig,
    TransformerLM,
    TransformerLMConfig,
    VQVAEConfig,
    WaveNet,
    WaveNetConfig,
    create_model,
    decoding,
)
from fastgen.models.base import GenerativeModel
from fastgen.models.conditioning import tempered_noise
from fastgen.models.decoding import Chooser, choose, tempered
from fastgen.models.recurrent_gan import RecurrentGenerator

INF = math.inf
TINY_TEMPERATURES = (1e-4, 1e-20, 1e-38, 1e-39, 1e-45, 5e-324)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}, {"top_p": 5e-324}], ids=str)
def test_as_the_temperature_goes_to_0_the_most_likely_token_is_chosen(
    options: dict[str, float], dtype: torch.dtype
) -> None:
    logits = torch.tensor([[1.0, 2.0, 30.0], [-30.0, -1.0, -20.0], [-INF, -INF, -5.0], [3.0, 65000.0, -INF]]).to(dtype)
    for temperature in (0.0, *TINY_TEMPERATURES):
        for seed in range(5):
            chosen = choose(logits, temperature, seeded(seed), **options)  # type: ignore[arg-type]
            assert chosen.tolist() == [2, 1, 2, 1], temperature


def test_equally_likely_tokens_are_chosen_equally_often_at_a_tiny_temperature_and_the_first_at_0() -> None:
    logits = torch.tensor([[5.0, 1.0, 5.0]]).expand(2000, -1)
    share = choose(logits, 1e-39, seeded()).bincount(minlength=3) / 2000
    assert share[1] == 0
    assert abs(float(share[0]) - 0.5) < 0.05
    assert choose(logits, 0.0).unique().tolist() == [0]


def test_at_a_huge_temperature_every_possible_token_is_equally_likely() -> None:
    logits = torch.tensor([[9.0, -9.0, -INF]]).expand(2000, -1)
    share = choose(logits, 1e30, seeded()).bincount(minlength=3) / 2000
    assert share[2] == 0
    assert abs(float(share[0]) - 0.5) < 0.05


@pytest.mark.parametrize("k", [1, 2, 3, 4, 99])
def test_top_k_keeps_k_tokens_also_where_some_are_equally_likely(k: int) -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0, 0.0]]).expand(500, -1)
    expected = [1, 0, 2, 3][:k]  # the most likely, then the first ones
    assert choose(logits, 1.0, seeded(), top_k=k).unique().tolist() == sorted(expected)


def test_a_certain_token_is_chosen_for_any_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.zeros(*shape))
    assert choose(torch.tensor([[-INF, -INF, 0.0, -INF]]), 1.0).tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("row", "got"),
    [([0.0, math.nan], "NaN in 1 of 2"), ([0.0, INF], r"\+inf in 1 of 2"), ([-INF, -INF], "only -inf in 1 of 2")],
    ids=["NaN", "inf", "all -inf"],
)
def test_logits_without_a_possible_token_raise_an_error(
    row: list[float], got: str, temperature: float, dtype: torch.dtype
) -> None:
    logits = torch.tensor([row, [1.0, -INF]]).to(dtype)
    with pytest.raises(ValueError, match=f"logits: expected numbers or -inf, .*got {got} choices"):
        choose(logits, temperature)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected a number >= 0, got -1.0"),
        ({"temperature": math.nan}, "temperature: expected a number >= 0, got nan"),
        ({"temperature": INF}, "temperature: expected a number >= 0, got inf"),
        ({"top_k": -1}, "top_k: expected an integer >= 0, got -1"),
        ({"top_p": 0.0}, r"top_p: expected a probability in \(0, 1\], got 0.0"),
        ({"top_p": math.nan}, r"top_p: expected a probability in \(0, 1\], got nan"),
    ],
    ids=str,
)
def test_options_out_of_range_raise_an_error(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Chooser(**options)  # type: ignore[arg-type]


def test_logits_of_another_dtype_or_shape_raise_an_error() -> None:
    with pytest.raises(TypeError, match=r"logits: expected a floating-point tensor, got torch.int64"):
        choose(torch.zeros(2, 3, dtype=torch.int64), 1.0)
    with pytest.raises(ValueError, match=r"logits: expected \(B, tokens\), got \(3,\)"):
        choose(torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match="generator: expected one, or one for each of 2 rows, got 1"):
        choose(torch.zeros(2, 3), 1.0, [seeded()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_tempered_logits_have_the_softmax_of_the_logits_over_the_temperature(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 5, generator=seeded()).to(dtype)
    for temperature in (0.3, 1.0, 40.0):
        found = tempered(logits, temperature).softmax(1).double()
        torch.testing.assert_close(found, (logits.double() / temperature).softmax(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_softmax_at_a_tiny_temperature_is_one_hot_with_a_finite_gradient(hard: bool) -> None:
    config = RecurrentGANConfig(kind="text", vocabulary="abc", temperature=1e-39, hard=hard)
    generator = RecurrentGenerator(config, 3)
    disturbed = torch.tensor([[1.0, 2.0, 30.0], [7.0, -30.0, -20.0]], requires_grad=True)
    symbols = generator.sample(disturbed)
    assert symbols.tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    (symbols * torch.randn(2, 3)).sum().backward()
    assert disturbed.grad is not None
    assert bool(disturbed.grad.isfinite().all())


def sampling_models() -> dict[str, GenerativeModel]:
    small: dict[str, int] = {"width": 8, "depth": 1, "num_heads": 2}
    return {
        "transformer-lm": TransformerLM(TransformerLMConfig(vocabulary="abc", context=4, **small)),  # type: ignore[arg-type]
        "image-transformer": ImageTransformer(ImageTransformerConfig(image_size=4, **small)),  # type: ignore[arg-type]
        "vq-vae": VQVAE(VQVAEConfig(width=4, prior_width=8)),
        "wavenet": WaveNet(WaveNetConfig(length=9, channels=4, skip_channels=4, cycle=2, reach=3)),
        "seq2seq": Seq2Seq(
            Seq2SeqConfig("abc", 5, 5, width=8, num_heads=2, encoder_depth=1, decoder_depth=1),
        ),
        "recurrent-gan": RecurrentGAN(RecurrentGANConfig(kind="text", vocabulary="abc", text_length=4)),
    }


@pytest.mark.parametrize("name", sampling_models())
def test_sampling_with_nan_weights_raises_an_error(name: str) -> None:
    model = sampling_models()[name]
    model.draw(2, model.sampling_class(), generator=seeded())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    with pytest.raises(ValueError, match=r"logits|steps"):
        model.draw(2, model.sampling_class(), generator=seeded())


@pytest.mark.parametrize("name", [name for name in sampling_models() if name != "recurrent-gan"])
def test_samples_at_a_tiny_temperature_are_greedy(name: str) -> None:
    model = sampling_models()[name]
    samples = []
    for temperature in (0.0, 1e-39):
        options = model.sampling_class(temperature=temperature)
        out = model.draw(2, options, generator=seeded())
        samples.append(vars(out))
    for field, value in samples[0].items():
        other = samples[1][field]
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other


LATENT = {
    "vae": {"width": 8},
    "conv-vae": {"width": 4},
    "cvae": {"width": 8},
    "flow-vae": {"width": 8},
    "gan": {"width": 8},
    "cgan": {"width": 8, "classes": 3},
    "dcgan": {"width": 4},
    "cdcgan": {"width": 4, "classes": 3},
    "sagan": {"width": 8},
    "attention-gan": {"width": 4},
    "transgan": {"width": 4},
}


@pytest.mark.parametrize("name", LATENT)
def test_the_temperature_of_a_latent_scales_its_noise(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, image_size=8, **LATENT[name]).eval()
    label = {"label": 1} if hasattr(model.sampling_class(), "label") and name != "sagan" else {}

    def pixels(temperature: float) -> Tensor:
        return model.sample(3, generator=seeded(), temperature=temperature, **label)  # type: ignore[return-value]

    usual = pixels(1.0)
    assert torch.equal(model.sample(3, generator=seeded(), **label), usual)  # type: ignore[arg-type]
    assert not torch.equal(pixels(0.5), usual)
    assert torch.equal(tempered_noise(usual, model.sampling_class(temperature=0.5, **label)), 0.5 * usual)
    same = pixels(0.0)
    torch.testing.assert_close(same, same[:1].expand_as(same))
    options = model.sampling_class(temperature=0.0, **label)
    path = model.interpolate(1, 3, options, generator=seeded()).pixels
    torch.testing.assert_close(path, path[:1].expand_as(path))
    with pytest.raises(ValueError, match="temperature: expected a number >= 0, got -1"):
        pixels(-1.0)


def test_examples_in_docstrings_run() -> None:
    assert doctest.testmod(decoding).failed == 0
