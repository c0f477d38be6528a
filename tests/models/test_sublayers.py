"""Models that draw in fewer calls than they learn in, or read tables of embeddings: changed parts are called there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fastgen.models import (
    ConvVAE,
    ConvVAEConfig,
    ImageTransformer,
    ImageTransformerConfig,
    NoOptions,
    RecurrentGAN,
    RecurrentGANConfig,
    Seq2Seq,
    Seq2SeqConfig,
    TransformerLM,
    TransformerLMConfig,
    WaveNet,
    WaveNetConfig,
)
from fastgen.models.image_transformer import PixelOptions
from fastgen.models.transformer_lm import TextOptions
from fastgen.models.vq_vae import VQVAE, CodeOptions, VQVAEConfig
from fastgen.models.wavenet import SoundOptions

pytestmark = pytest.mark.filterwarnings("ignore")


def seeded():
    return torch.Generator().manual_seed(3)


def language_model(**options):
    return TransformerLM(TransformerLMConfig(vocabulary="abc ", width=16, num_heads=2, depth=2, **options)).eval()


def image_model():
    return ImageTransformer(ImageTransformerConfig(image_size=4, levels=17, width=16, num_heads=2, depth=1)).eval()


def wavenet():
    return WaveNet(WaveNetConfig(length=20, channels=4, skip_channels=4, cycle=3, reach=4)).eval()


DRAWN = {
    "TransformerLM": (language_model, lambda model: model.draw(2, TextOptions("ab", 4), generator=seeded()).texts),
    "ImageTransformer": (image_model, lambda model: model.draw(2, PixelOptions(), generator=seeded()).pixels),
    "WaveNet": (wavenet, lambda model: model.draw(2, SoundOptions(), generator=seeded()).waves),
    "Seq2Seq": (
        lambda: Seq2Seq(Seq2SeqConfig(width=16, num_heads=2, encoder_depth=1, decoder_depth=1)).eval(),
        lambda model: model.decode(torch.full((2, model.config.source_length), 4)),
    ),
    "VQVAE": (
        lambda: VQVAE(VQVAEConfig(image_size=8, width=8)).eval(),
        lambda model: model.draw(2, CodeOptions(), generator=seeded()).pixels,
    ),
    "RecurrentGAN": (
        lambda: RecurrentGAN(RecurrentGANConfig()).eval(),
        lambda model: model._generate(2, seeded()),
    ),
    "ConvVAE": (lambda: ConvVAE(ConvVAEConfig()).eval(), lambda m: m.draw(2, NoOptions(), generator=seeded()).pixels),
}


def assert_same(a, b):
    assert a == b if isinstance(a, list) else torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("name", ["TransformerLM", "ImageTransformer", "WaveNet", "Seq2Seq", "VQVAE"])
def test_hooks_of_every_linear_map_fire_in_drawing_and_change_nothing(name):
    make, draw = DRAWN[name]
    model, fired = make(), set()
    expected = draw(model)
    maps = {key: part for key, part in model.named_modules() if isinstance(part, (nn.Linear, nn.RMSNorm))}
    for key, part in maps.items():
        part.register_forward_hook(lambda module, arguments, out, key=key: fired.add(key))
    assert_same(draw(model), expected)
    assert fired == set(maps)


@pytest.mark.parametrize("sublayer", ["layers.0.taps", "layers.2.out", "layers.1", "front"])
def test_a_wavenet_calls_a_hooked_part_once_for_each_sample(sublayer):
    make, draw = DRAWN["WaveNet"]
    model, calls = make(), []
    model.get_submodule(sublayer).register_forward_hook(lambda module, arguments, out: calls.append(1))
    draw(model)
    assert len(calls) == model.config.length


@pytest.mark.parametrize("name", DRAWN)
def test_dynamically_quantized_models_draw(name):
    make, draw = DRAWN[name]
    drawn = draw(torch.ao.quantization.quantize_dynamic(make(), {nn.Linear}, dtype=torch.qint8))
    assert isinstance(drawn, list) or drawn.isfinite().all()


class AdaptedEmbedding(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.delta = nn.Parameter(torch.randn_like(base.weight))

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, tokens):
        return self.base_layer(tokens) + nn.functional.embedding(tokens, self.delta)


TOKENS = torch.tensor([[0, 1, 2, 3]])
EMBEDDED = {
    "TransformerLM": (lambda: language_model(tie_embeddings=True), ("embedding",), lambda model: model(TOKENS)),
    "Seq2Seq": (
        DRAWN["Seq2Seq"][0],
        ("embedding",),
        lambda model: model(torch.full((1, model.config.source_length), 4), TOKENS),
    ),
    "ImageTransformer": (
        image_model,
        ("row", "column", "colour", "start"),  # word-lint: ok
        lambda model: model(TOKENS),
    ),
    "VQVAE": (DRAWN["VQVAE"][0], ("prior.position",), lambda model: model.prior(torch.zeros(1, 4, dtype=torch.int64))),
}


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return 2 * weight


@pytest.mark.parametrize("name", EMBEDDED)
def test_adapters_parametrizations_and_hooks_of_embeddings(name):
    make, sublayers, run = EMBEDDED[name]
    for sublayer in sublayers:
        model, calls = make(), []
        expected, plain, doubled = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
        model.set_submodule(sublayer, AdaptedEmbedding(model.get_submodule(sublayer)))
        expected.get_submodule(sublayer).weight.data += model.get_submodule(sublayer).delta.data
        torch.testing.assert_close(run(model), run(expected))
        model.get_submodule(sublayer).register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        run(model)
        assert len(calls) == (2 if name == "Seq2Seq" else 1)  # of the source and the target
        factor = Doubled()
        parametrize.register_parametrization(doubled.get_submodule(sublayer), "weight", factor)
        plain.get_submodule(sublayer).weight.data *= 2
        factor.calls = 0
        torch.testing.assert_close(run(doubled), run(plain))
        assert factor.calls == (2 if name == "Seq2Seq" else 1)


def test_a_negative_token_has_no_pixels():
    with pytest.raises(ValueError, match="tokens: expected integers from 0 to 16, got -1"):
        image_model().pixels(torch.full((1, 16), -1))
