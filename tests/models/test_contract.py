"""What every registered model does: gradients, samples, saving, mixed precision, compilation.

``tests/train/test_zoo.py`` does the same through the command line: training, resuming, evaluating, sampling.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgen.models import MODELS, TRANSLATED, GenerativeModel, StepContext
from tests.models.saved_models import CASES, SAMPLING, batch_of, config_of, fill

FIRST = {name: case for case, (name, _) in reversed(CASES.items())}
"""One small configuration of each model."""


def small(name: str) -> GenerativeModel:
    torch.manual_seed(0)
    return MODELS[name](config_of(FIRST[name]))


def batch_for(model: GenerativeModel) -> dict[str, Tensor]:
    return batch_of(model.kind, model.config)


def samples(model: GenerativeModel, seed: int = 0, n: int = 3) -> Tensor | list[str]:
    generator = torch.Generator().manual_seed(seed)
    if model.kind in TRANSLATED:
        return model.translate(batch_for(model), model.sampling_class(), generator=generator).pixels[:n]
    return model.sample(n, generator=generator, **SAMPLING.get(model.name, {}))


def losses(model: GenerativeModel, step: int = 1) -> dict[str, Tensor]:
    out = {}
    for phase in model.phases():
        torch.manual_seed(3)
        out[phase.name] = model.loss(phase.name, batch_for(model), StepContext(step, 100))["loss"]
    return out


def test_every_model_has_a_case() -> None:
    assert FIRST.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_the_losses_reach_every_trained_parameter(name: str) -> None:
    model = small(name)
    fill(model)
    for phase in model.phases():
        trained = [module for network in phase.networks for module in [model.get_submodule(network)]] or [model]
        weights = [(n, p) for module in trained for n, p in module.named_parameters() if p.requires_grad]
        torch.manual_seed(3)
        loss = model.loss(phase.name, batch_for(model), StepContext(1, 100))["loss"]
        assert loss.shape == ()
        grads = torch.autograd.grad(loss, [weight for _, weight in weights], allow_unused=True)
        for (weight, _), grad in zip(weights, grads, strict=True):
            assert grad is not None, f"{phase.name}: {weight}"
            assert bool(grad.isfinite().all()), f"{phase.name}: {weight}"


@pytest.mark.parametrize("name", MODELS)
def test_samples_have_the_shape_of_the_data_and_depend_on_the_generator_alone(name: str) -> None:
    model = small(name)
    fill(model)
    first, again, other = samples(model), samples(model), samples(model, seed=1)
    assert len(first) == 3
    if isinstance(first, list):
        assert all(isinstance(text, str) for text in first)
        assert first == again
    else:
        low = -1 if model.kind == "audio" else 0
        assert bool(((first >= low) & (first <= 1)).all())
        if model.kind == "images":
            assert first.shape[1:] == (model.config.channels, model.config.image_size, model.config.image_size)
        torch.testing.assert_close(first, again, rtol=0, atol=0)
    if model.kind not in TRANSLATED:
        assert len(other) == 3
        with pytest.raises(ValueError, match="n: expected"):
            model.sample(0)
        with pytest.raises(TypeError, match=f"{name}: expected options among"):
            model.sample(1, flavour=1)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_is_the_same_again(name: str, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    model = small(name).eval()
    model.save_pretrained(tmp_path)
    again = GenerativeModel.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.config == model.config
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], tensor, rtol=0, atol=0)
    a, b = samples(model), samples(again)
    assert a == b if isinstance(a, list) else torch.equal(a, b)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_autocast_gives_finite_losses_near_those_of_float32(name: str) -> None:
    model = small(name)
    with torch.no_grad():
        exact = losses(model) if model.kind == "text" else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = losses(model)
    for phase, loss in lowered.items():
        assert bool(loss.isfinite()), phase
        loss.backward()
        if exact is not None:
            torch.testing.assert_close(loss.float(), exact[phase], rtol=0.1, atol=0.1)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", MODELS)
def test_compiled_networks_give_the_same_losses(name: str) -> None:
    plain, compiled = small(name), small(name)
    for phase in compiled.phases():
        for network in phase.networks or ("",):
            compiled.get_submodule(network).compile(backend="eager")
    expected, ours = losses(plain), losses(compiled)
    for phase, loss in expected.items():
        torch.testing.assert_close(ours[phase], loss, rtol=1e-4, atol=1e-5)
