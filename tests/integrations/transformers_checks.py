"""What the tests of models of Hugging Face transformers compare; skips them where there is no such package."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

import fastgen

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra integrations)")
if int(transformers.__version__.partition(".")[0]) < 5:
    pytest.skip(f"transformers >= 5 is needed, got {transformers.__version__}", allow_module_level=True)

from transformers import masking_utils  # noqa: E402

import fastgen.integrations  # noqa: E402
from fastgen.integrations import transformers as integration  # noqa: E402
from tests.integrations.transformers_models import CASES  # noqa: E402

transformers.logging.set_verbosity_error()


NAMES = [case.name for case in CASES]
BY_NAME = dict(zip(NAMES, CASES, strict=True))
GENERATING = [case for case in CASES if case.generates]
MASKED = [case for case in CASES if case.kind in ("tokens", "pairs")]
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


def in_new_form():
    """Whether masks are requested by lengths and offsets, or by positions (before 5.3)."""
    return "q_length" in inspect.signature(masking_utils.sdpa_mask).parameters


def over(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def skip_unavailable(request):
    """Skips a case whose model the installed version lacks."""
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    if case and not hasattr(transformers, case.model):
        pytest.skip(f"transformers {transformers.__version__} has no {case.model}")
    if case and case.oldest > VERSION:
        pytest.skip(f"{case.name} computes attention itself in transformers {transformers.__version__}")


def output(case, model, x, mask=None, **more):
    result = case.run(model, x, mask, **more)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def padding(side, batch=2, length=9):
    """(B, N), the first item padded on a side by three tokens."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, slice(0, 3) if side == "left" else slice(-3, None)] = 0
    return mask


def values_and_gradients(case, model, x, mask=None):
    """The output at the tokens that are not padded, and a loss's gradients."""
    x = x.detach().requires_grad_()
    y = output(case, model, x, mask)
    if mask is not None and case.kind == "tokens":
        y = y * mask[..., None]
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    gradients = torch.autograd.grad((y * weights).sum(), [x, *parameters(model)], materialize_grads=True)
    return [y.detach(), *gradients]


def penalty_gradients(case, model, x, mask=None):
    x = x.detach().requires_grad_()
    y = output(case, model, x, mask)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), parameters(model), materialize_grads=True)


def tangent(case, model, x):
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(x.dtype)
    return torch.func.jvp(lambda x: output(case, model, x), (x,), (direction,))


def difference(results, expected):
    """The largest difference, relative to the largest number."""
    scale = max(float(b.abs().max()) for b in expected)
    return max(float((a - b).abs().max()) for a, b in zip(results, expected, strict=True)) / scale


def eager(model):
    """A copy of a model with transformers' own formula."""
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    return other


def accelerated(model):
    report = fastgen.accelerate(model)
    assert report.replaced
    assert not report.kept
    return model


def snapshot(model):
    """What ``restore`` must bring back: attributes, configs and tensors, by identity where there is one."""
    return {
        name: (type(part), {key: id(value) for key, value in vars(part).items()}, [id(p) for p in part.parameters()])
        for name, part in model.named_modules()
    }, [config._attn_implementation for part in model.modules() for config in integration._configs(part)]
