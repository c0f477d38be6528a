"""What every registered model does: gradients, mixed precision, samples, saving, compilation.

``tests/models/test_saved_models.py`` compares losses, scores and samples with recorded ones, and
``tests/train/test_zoo.py`` trains, resumes, evaluates and samples every model from the command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.models import MODELS, TRANSLATED, GenerativeModel, StepContext
from fastgen.models.adversarial import ImageGAN
from tests.models.saved_models import CASES, SAMPLING, batch_of, config_of, fill

DENSE = {"width": 8, "depth": 1}
LM = {"width": 16, "depth": 1, "num_heads": 2, "context": 8}
SEQ2SEQ = {"width": 16, "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1}
PIXELS = {"image_size": 4, "levels": 6, "width": 16, "depth": 1, "num_heads": 2}
CAPTIONS = {"captions": True, "caption_vocabulary": "abc", "caption_length": 3, "caption_examples": ("a", "bc", "cab")}
WAVENET = {"channels": 4, "skip_channels": 8, "cycle": 3, "reach": 8, "crop": 20}
RECURRENT = {"generator_width": 8, "critic_width": 8}
VQ_VAE = {"width": 4, "codebook_size": 7, "prior_width": 8, "code_dim": 3}
PIX2PIX = {"width": 4, "patch_width": 4, "num_downsamples": 3}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = CASES | {
    "cgan, projection": ("cgan", {**DENSE, "latent_dim": 8, "projection": True}),
    "dcgan, r1": ("dcgan", {"width": 4, "latent_dim": 8, "penalty": "r1"}),
    "dcgan, dragan": ("dcgan", {"width": 4, "latent_dim": 8, "penalty": "dragan"}),
    "dcgan, gradient": (
        "dcgan",
        {"width": 4, "latent_dim": 8, "penalty": "gradient", "discriminator_norm": "layer", "loss": "wasserstein"},
    ),
    "cdcgan, projection": ("cdcgan", {"width": 4, "latent_dim": 8, "projection": True}),
    "sagan, no labels": ("sagan", {"width": 8, "latent_dim": 8, "classes": 0}),
    "attention-gan, strided": (
        "attention-gan",
        {"width": 4, "latent_dim": 8, "gate_width": 4, "gate_stride": 2, "gate_each_channel": True},
    ),
    "stylegan, mixing": ("stylegan", {"width": 4, "style_dim": 8, "latent_dim": 8, "style_mixing": 0.5}),
    "stylegan, no minibatch statistics": (
        "stylegan",
        {"width": 4, "style_dim": 8, "latent_dim": 8, "output": "residual", "minibatch_std": False},
    ),
    "transgan, windows": (
        "transgan",
        {"width": 8, "latent_dim": 8, "num_heads": 2, "window": 3, "patch_size": 2, "summary": "mean"}
        | {"generator_patch_size": 2, "convolutions": True},
    ),
    "recurrent-gan, color": ("recurrent-gan", {**RECURRENT, "image_size": 5, "channels": 3, "penalty": "gradient"}),
    "recurrent-gan, soft": (
        "recurrent-gan",
        {**RECURRENT, "kind": "sequences", "hard": False, "temperature": 0.5, "noise_dim": 3},
    ),
    "recurrent-gan, r1": ("recurrent-gan", {**RECURRENT, "kind": "sequences", "penalty": "r1"}),
    "recurrent-gan, gradient": (
        "recurrent-gan",
        {**RECURRENT, "kind": "sequences", "penalty": "gradient", "loss": "wasserstein"},
    ),
    "recurrent-gan, no penalty": (
        "recurrent-gan",
        {**RECURRENT, "kind": "sequences", "penalty": "none", "loss": "hinge"},
    ),
    "cyclegan, no identity": (
        "cyclegan",
        {"width": 4, "blocks": 1, "patch_width": 4, "identity_weight": 0.0, "history": 0},
    ),
    "pix2pix, instance": ("pix2pix", {**PIX2PIX, "norm": "instance", "dropout": 0.0, "patch_norm": "instance"}),
    "vae, color": ("vae", {**DENSE, "latent_dim": 4, "image_size": 5, "channels": 3}),
    "vae, free bits": ("vae", {**DENSE, "latent_dim": 4, "free_bits": 0.1}),
    "vae, gaussian": ("vae", {**DENSE, "latent_dim": 4, "likelihood": "gaussian"}),
    "conv-vae, binomial": ("conv-vae", {"width": 4, "hidden_dim": 16, "likelihood": "binomial"}),
    "conv-vae, free bits": (
        "conv-vae",
        {"width": 4, "hidden_dim": 16, "attention": True, "free_bits": 0.01, "levels": 256},
    ),
    "vq-vae, gaussian": (
        "vq-vae",
        {**VQ_VAE, "image_size": 6, "channels": 3, "num_downsamples": 1, "likelihood": "gaussian"},
    ),
    "vq-vae, binomial": ("vq-vae", {**VQ_VAE, "image_size": 16, "num_downsamples": 3, "likelihood": "binomial"}),
    "transformer-lm, untied": (
        "transformer-lm",
        {**LM, "activation": "swiglu", "tie_embeddings": False, "dropout": 0.3},
    ),
    "transformer-lm, no norm of heads": ("transformer-lm", {**LM, "qk_norm": False, "mlp_width": 12}),
    "transformer-lm, odd sizes": ("transformer-lm", {**LM, "width": 18, "num_heads": 3, "context": 7}),
    "transformer-lm, window": ("transformer-lm", {**LM, "window": 3}),
    "transformer-lm, longer tokens": ("transformer-lm", {**LM, "vocabulary": ("\n", *"abcde", "ab", "cde")}),
    "seq2seq, odd sizes": (
        "seq2seq",
        {
            **SEQ2SEQ,
            "width": 18,
            "num_heads": 3,
            "source_length": 5,
            "target_length": 9,
            "mlp_width": 7,
            "dropout": 0.3,
        },
    ),
    "image-transformer, unconditional": ("image-transformer", {**PIXELS, "dropout": 0.5}),
    "image-transformer, color": ("image-transformer", {**PIXELS, "image_size": 3, "channels": 3}),
    "image-transformer, few tones": (
        "image-transformer",
        {**PIXELS, "activation": "swiglu", "levels": 256, "tones": 5, "qk_norm": False},
    ),
    "image-transformer, codes of captions": (
        "image-transformer",
        {**PIXELS, **CAPTIONS, "codebook_size": 5, "num_downsamples": 1, "levels": 256},
    ),
    "wavenet, odd sizes": (
        "wavenet",
        {**WAVENET, "channels": 3, "skip_channels": 7, "cycle": 4, "cycles": 1, "length": 37, "components": 1},
    ),
    "wavenet, one layer": ("wavenet", {**WAVENET, "cycle": 1, "cycles": 1, "reach": 1}),
}
"""Small configurations of each model: those with recorded outputs, and others."""
FIRST = {name: case for case, (name, _) in reversed(VARIANTS.items())}
ADVERSARIAL = ("discriminator", "critic")
"""Phases of models that train the networks of one phase against those of another, which are frozen meanwhile."""


def small(case: str, **more: Any) -> GenerativeModel:
    """The model of a case, with weights that have an effect on every output."""
    torch.manual_seed(0)
    name, options = VARIANTS[case]
    model = MODELS[name](config_of(name, {**options, **more}))
    fill(model)
    return model


def batch_for(model: GenerativeModel) -> dict[str, Tensor]:
    return batch_of(model.kind, model.config)


def samples(model: GenerativeModel, seed: int | None = 0, n: int = 3) -> Tensor | list[str]:
    """n samples with a generator of the seed; None: with torch's global one."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if model.kind in TRANSLATED:
        return model.translate(batch_for(model), model.sampling_class(), generator=generator).pixels[:n]
    return model.sample(n, generator=generator, **SAMPLING.get(model.name, {}))


def same(first: Tensor | list[str], second: Tensor | list[str]) -> bool:
    return torch.equal(first, second) if isinstance(first, Tensor) else first == second  # type: ignore[arg-type]


def is_adversarial(model: GenerativeModel) -> bool:
    return model.phases()[0].name in ADVERSARIAL


def own_weights(model: GenerativeModel, phase: str) -> set[str]:
    """Names of the parameters that a phase updates; in adversarial models the others are frozen, as in training."""
    (networks,) = (each.networks for each in model.phases() if each.name == phase)
    inside = tuple(f"{network}." for network in networks)
    own = {name for name, _ in model.named_parameters() if not networks or name.startswith(inside)}
    if is_adversarial(model):
        for name, weight in model.named_parameters():
            weight.requires_grad_(name in own)
    return own


def step(model: GenerativeModel, phase: str, number: int = 1, loss: Any = None) -> dict[str, Tensor]:
    """A phase's loss and its gradients."""
    own_weights(model, phase)
    model.zero_grad()
    torch.manual_seed(3)
    values = (loss or model.loss)(phase, batch_for(model), StepContext(number, 100))
    values["loss"].backward()
    return values


def test_every_model_has_a_case() -> None:
    assert FIRST.keys() == MODELS.keys()


@pytest.mark.parametrize("case", VARIANTS)
def test_a_phase_gives_finite_gradients_to_all_of_its_weights_and_no_others(case: str) -> None:
    """In float32, and under bfloat16 autocast, where the loss of a likelihood is close to that in float32."""
    model = small(case)
    model.check(batch_for(model))
    assert sum(len(own_weights(model, phase.name)) for phase in model.phases()) == len(list(model.parameters()))
    for phase in model.phases():
        own = own_weights(model, phase.name)
        values = {}
        for autocast in (False, True):
            fill(model)  # the buffers too, which a loss may update
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                values[autocast] = step(model, phase.name)
            assert all((value.dtype, value.shape) == (torch.float32, ()) for value in values[autocast].values())
            for name, weight in model.named_parameters():
                if name in own:
                    assert weight.grad is not None, f"{phase.name}: {name}"
                    assert bool(weight.grad.isfinite().all()), f"{phase.name}: {name}"
                    assert bool(weight.grad.any()) or name in CANCELS, f"{phase.name}: {name}"
                else:
                    assert weight.grad is None or not weight.grad.any(), f"{phase.name}: {name}"
        if is_adversarial(model):
            assert all(not value.requires_grad for name, value in values[True].items() if name != "loss")
        else:
            torch.testing.assert_close(values[True]["loss"], values[False]["loss"], rtol=0.02, atol=0)


CANCELS = ("critic.score.bias", "discriminator.5.bias")
"""Last biases, which add as much to the scores of real as of generated items: their Wasserstein loss is constant."""


@pytest.mark.parametrize("case", VARIANTS)
def test_scores_and_samples_under_autocast_are_finite(case: str) -> None:
    model = small(case)
    with torch.autocast("cpu", torch.bfloat16):
        scores, found = model.score(batch_for(model)), samples(model, n=2)
    assert all(bool(score.isfinite().all()) and len(score) == 4 for score in scores.values())
    assert len(found) == 2
    assert isinstance(found, list) or bool(found.isfinite().all())


@pytest.mark.parametrize("case", VARIANTS)
def test_samples_have_the_shape_of_the_data_and_depend_on_the_generator_alone(case: str) -> None:
    """In training mode too: dropout is inactive, and no running statistic is used or changed."""
    model = small(case)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, again, other = samples(model), samples(model), samples(model, seed=1)
    assert len(first) == len(other) == 3
    assert same(first, again)
    without_noise = model.kind in TRANSLATED and getattr(model.config, "dropout", 0) == 0
    assert same(first, other) == without_noise
    if not without_noise:
        torch.manual_seed(5)
        unseeded = samples(model, seed=None)
        assert not same(unseeded, samples(model, seed=None))
        torch.manual_seed(5)
        assert same(unseeded, samples(model, seed=None))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    if isinstance(first, list):
        assert all(isinstance(text, str) for text in first)
        assert len(set(first)) > 1
    else:
        low = -1 if model.kind == "audio" else 0
        assert bool(((first >= low) & (first <= 1)).all())
        if model.kind != "audio":
            assert first.shape[1:] == (model.config.channels, model.config.image_size, model.config.image_size)
    if isinstance(model, ImageGAN):
        assert not torch.equal(first[0], first[1])
        four, eight = samples(model, n=4), samples(model, n=8)
        torch.testing.assert_close(eight[:4], four)  # independent of the number of samples
    if model.kind not in TRANSLATED:
        with pytest.raises(ValueError, match=r"^n: expected a positive integer, got 0$"):
            model.sample(0)
        with pytest.raises(TypeError, match=f"{model.name}: expected (options among .*|no options), got flavor"):
            model.sample(1, flavor=1)


@pytest.mark.parametrize("case", VARIANTS)
def test_a_saved_model_is_the_same_again(case: str, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    model = small(case)
    for phase in model.phases():  # running statistics, histories and codebooks differ from their initial values
        step(model, phase.name)
    model.eval().save_pretrained(tmp_path)
    again = GenerativeModel.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert (again.config, again.kind) == (model.config, model.kind)
    torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    scores = [each.score(batch_for(model), generator=torch.Generator().manual_seed(0)) for each in (model, again)]
    torch.testing.assert_close(*scores)
    assert same(samples(model), samples(again))


COMPILED: dict[str, dict[str, Any]] = {
    **{case: {} for case in FIRST.values()},
    **{case: {"penalty": "r1"} for case in ("dcgan", "pix2pix", "cyclegan, no identity")},
    **{case: {} for case in ("vae, free bits", "vae, gaussian", "flow-vae, planar")},
    "transformer-lm": {"depth": 1},
    "transformer-lm, untied": {"dropout": 0.0},
    "transgan": {"generator_depth": 1},
}
"""Cases to compile, and the options that they change."""
RESEMBLING = ("cyclegan, no identity", "vae, free bits", "vae, gaussian", "flow-vae, planar")
"""Of models that are compiled with other options already."""
TRACED_BACKWARD = ("conv-vae", "dcgan", "transformer-lm", "transformer-lm, untied")
"""With backend "aot_eager", which traces the gradients too and takes longer. It has no double backward."""
GRAPH_BREAKS = {"recurrent-gan": ("critic", "generator"), "vq-vae": ("prior",), "wavenet": ("sound",)}
"""Phases that are not one graph: torch.compile does not trace nn.GRU, and a WaveNet's crop begins at random."""


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in RESEMBLING else case for case in COMPILED]
)
def test_compiled_models_have_the_same_losses_gradients_and_buffers(case: str) -> None:
    """The whole loss in one graph; of adversarial models each network in one.

    The penalty of every second step needs the double backward that torch.compile lacks: such steps run eagerly.
    """
    more = dict(COMPILED[case])
    if "penalty_every" in MODELS[VARIANTS[case][0]].config_class.__dataclass_fields__:
        more["penalty_every"] = 2
    plain, model = small(case, **more), small(case, **more)
    options: dict[str, Any] = {"backend": "aot_eager" if case in TRACED_BACKWARD else "eager"}
    loss: dict[str, Any] = {}
    for phase in model.phases():
        options["fullgraph"] = phase.name not in GRAPH_BREAKS.get(model.name, ())
        if is_adversarial(model):
            for network in phase.networks:
                model.get_submodule(network).compile(**options)
        else:
            loss[phase.name] = torch.compile(model.loss, **options)
    first, *others = (phase.name for phase in model.phases())
    for phase, number in ((first, 1), *((name, 1) for name in others), (first, 2 if is_adversarial(model) else 1)):
        expected, ours = step(plain, phase, number), step(model, phase, number, loss.get(phase))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "name", [name if name == "wavenet" else pytest.param(name, marks=pytest.mark.slow) for name in FIRST]
)
def test_networks_that_the_trainer_compiles_are_used_by_the_loss(name: str) -> None:
    """The trainer calls ``compile`` on the networks of a phase: a loss that bypassed them would stay eager."""
    model, graphs = small(FIRST[name]), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    for phase in model.phases():
        for network in phase.networks or ("",):
            model.get_submodule(network).compile(backend=backend)
    for phase in model.phases():
        graphs.clear()
        model.loss(phase.name, batch_for(model), StepContext(1, 100))
        assert graphs or phase.name in ("discriminator", "critic"), phase.name  # their penalty is eager
