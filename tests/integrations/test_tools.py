"""Tools that change layers of torch.nn, before and after ``accelerate``, and ``restore`` in the end.

What a tool makes of a layer is known without it: the tool bakes the weights, and torch's layer runs with those. (torch
itself skips what a tool did to ``out_proj`` of MultiheadAttention, which it never calls.)
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import fastgen
from fastgen.losses import r1_penalty

WIDTH = 16
LAYERS = {
    "MultiheadAttention": lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True),
    "TransformerEncoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, 0.0, batch_first=True), 1
    ),
    "TransformerDecoderLayer": lambda: nn.TransformerDecoderLayer(WIDTH, 2, WIDTH, 0.0, batch_first=True),
    "LSTM": lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True),
    "GRU": lambda: nn.GRU(WIDTH, WIDTH, batch_first=True),
}
OWN = {"MultiheadAttention": "in_proj_weight", "LSTM": "weight_hh_l0", "GRU": "weight_hh_l0"}
"""A weight that the layer itself has."""


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layer = LAYERS[kind]()

    def forward(self, x):
        x = self.first(x)
        if self.kind == "MultiheadAttention":
            return self.layer(x, x, x, need_weights=False)[0]
        out = self.layer(x, x) if "Decoder" in self.kind else self.layer(x)
        return out[0] if isinstance(out, tuple) else out


def made(kind, dtype=torch.float64):
    torch.manual_seed(0)
    return Model(kind).eval().to(dtype)


def inputs(dtype=torch.float64):
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def linears(model):
    return [part for part in model.modules() if isinstance(part, nn.Linear)]


def weights(model):
    """Modules and names of the weights of linear layers, and of one that the layer itself has."""
    own = [(model.layer, OWN[model.kind])] if model.kind in OWN else []
    return [(part, "weight") for part in linears(model)] + own


# --------------------------------------------------------------------------------------------------
# Tools: what applies them to a model, and what makes their result the weights


def prune_all(model):
    for part, name in weights(model):
        prune.l1_unstructured(part, name, 0.5)
    return model


def prune_for_good(model):
    for part, name in weights(model):
        prune.remove(part, name)
    return model


def hook_spectral_norm(model):
    for part, name in weights(model):
        nn.utils.spectral_norm(part, name)
    return model


def hook_spectral_norm_for_good(model):
    for part, name in weights(model):
        nn.utils.remove_spectral_norm(part, name)
    return model


def hook_weight_norm(model):
    for part, name in weights(model):
        nn.utils.weight_norm(part, name)
        getattr(part, f"{name}_g").data *= 1.5
    return model


def hook_weight_norm_for_good(model):
    for part, name in weights(model):
        nn.utils.remove_weight_norm(part, name)
    return model


def spectral_norm(model):
    for part in linears(model):
        parametrizations.spectral_norm(part)
    return model


def weight_norm(model):
    for part in linears(model):
        parametrizations.weight_norm(part)
        part.parametrizations.weight.original0.data *= 1.5
    return model


def parametrized_for_good(model):
    for part in linears(model):
        parametrize.remove_parametrizations(part, "weight")
    return model


def lora(model):
    peft = pytest.importorskip("peft")
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def lora_of_attention(model):
    """PEFT's adapter of MultiheadAttention, which merges its weights for the time of a call."""
    peft = pytest.importorskip("peft")
    if model.kind != "MultiheadAttention":
        pytest.skip("the adapter is one of MultiheadAttention")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))


def lora_for_good(model):
    return model.merge_and_unload()


def int8_weights(model):
    """torchao has a filter that leaves out_proj, whose weight torch reads."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def int8_weights_for_good(model):
    for part in linears(model):
        if type(part.weight) is not nn.Parameter:
            part.weight = nn.Parameter(part.weight.dequantize())
    return model


TOOLS: dict[str, tuple[Callable, Callable]] = {
    "prune": (prune_all, prune_for_good),
    "spectral_norm (hook)": (hook_spectral_norm, hook_spectral_norm_for_good),
    "weight_norm (hook)": (hook_weight_norm, hook_weight_norm_for_good),
    "spectral_norm (parametrization)": (spectral_norm, parametrized_for_good),
    "weight_norm (parametrization)": (weight_norm, parametrized_for_good),
    "PEFT LoRA": (lora, lora_for_good),
    "PEFT LoRA of MultiheadAttention": (lora_of_attention, lora_for_good),
    "torchao int8 weights": (int8_weights, int8_weights_for_good),
}


def applied(tool, model):
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm
        return tool(model).eval()


@pytest.mark.parametrize("order", ["tool first", "accelerate first"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("tool", TOOLS)
def test_tools(tool, kind, order):
    apply, bake = TOOLS[tool]
    dtype = torch.float32 if "int8" in tool else torch.float64
    expected = bake(applied(apply, made(kind, dtype)))
    x = inputs(dtype)
    model = made(kind, dtype)
    if order == "tool first":
        model = applied(apply, model)
        report = fastgen.accelerate(model)
    else:
        report = fastgen.accelerate(model)
        model = applied(apply, model)
    assert report.replaced and not report.kept, report  # noqa: PT018
    torch.testing.assert_close(model(x), expected(x))
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(x))

    for each in (model, expected):
        each.requires_grad_()
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for each, leaf in zip((model, expected), leaves, strict=True):
        each(leaf).square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None or "base_layer" in name or type(parameter) is not nn.Parameter, name

    assert set(fastgen.restore(model).replaced) == set(report.replaced) or tool.startswith("PEFT")
    assert not any(type(part).__module__.startswith("fastgen") for part in model.modules())
    back = bake(model)
    torch.testing.assert_close(back(x), expected(x))
    assert {name: type(part) for name, part in back.named_modules()} == {
        name: type(part) for name, part in made(kind).named_modules()
    }


def test_an_adapter_is_trained_merged_and_unloaded():
    peft = pytest.importorskip("peft")
    model, x = made("TransformerEncoder"), inputs()
    fastgen.accelerate(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["out_proj", "linear1"]))
    torch.testing.assert_close(adapted(x), model(x))
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        real = x.clone().requires_grad_()
        loss = adapted(x).square().mean() + 0.1 * r1_penalty(adapted(real).mean((1, 2)), real)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = adapted.eval()(x)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(x), trained)
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"layer.layers.0.self_attn.out_proj.weight", "layer.layers.0.linear1.weight"}
    assert merged is model
    assert len(fastgen.restore(model).replaced) == 3
    torch.testing.assert_close(model(x), trained)


@pytest.mark.parametrize("kind", LAYERS)
def test_dynamic_quantization(kind):
    """Of linear layers, in either order; torch's own encoder raises, in its fast path."""
    quantize = torch.ao.quantization.quantize_dynamic
    x, expected = inputs(torch.float32), quantize(made(kind, torch.float32), {nn.Linear})
    model = made(kind, torch.float32)
    fastgen.accelerate(model)
    after, before = quantize(model, {nn.Linear}), quantize(made(kind, torch.float32), {nn.Linear})
    fastgen.accelerate(before)
    with torch.no_grad():
        if kind == "TransformerEncoder":
            with pytest.raises(AttributeError, match="device"):
                expected(x)
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        expected = expected(x).detach()
        torch.testing.assert_close(expected, made(kind, torch.float32)(x), atol=0.1, rtol=0.1)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    for each in (before, after):
        with torch.no_grad():
            torch.testing.assert_close(each(x), expected)


def test_recurrent_layers_are_quantized_before_they_are_accelerated():
    """quantize_dynamic knows torch's class by its name; fastgen's is one that it leaves."""
    kept = torch.ao.quantization.quantize_dynamic(made("LSTM", torch.float32), {nn.LSTM})
    assert list(fastgen.accelerate(kept).kept.values()) == ["quantized: torch.ao.nn.quantized.dynamic.modules.rnn.LSTM"]
    model = made("LSTM", torch.float32)
    fastgen.accelerate(model)
    assert type(torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}).layer) is fastgen.nn.LSTM


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("how", ["cpu_offload", "dispatch_model"])
def test_offloaded_weights(kind, how, tmp_path):
    """accelerate's hooks set a forward on each module and load its own weights while it runs."""
    package = pytest.importorskip("accelerate")
    x, expected = inputs(), made(kind)(inputs()).detach()

    def offloaded(model):
        if how == "cpu_offload":
            return package.cpu_offload(model, execution_device=torch.device("cpu"))
        places = {"first": "cpu", "layer": "disk"}
        return package.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)

    model = made(kind)
    report = fastgen.accelerate(model)
    model = offloaded(model)
    assert any(p.is_meta for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    if how == "cpu_offload":
        with pytest.raises(RuntimeError, match="to have the forward of its class"):
            fastgen.restore(model)
        package.hooks.remove_hook_from_submodules(model)
        assert set(fastgen.restore(model).replaced) == set(report.replaced)
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected)
    else:
        return
    later = offloaded(made(kind))
    first = fastgen.accelerate(later)
    assert first.kept
    assert set(first.kept.values()) == {"forward is overridden on the instance"}
    package.hooks.remove_hook_from_submodules(later)
    assert {*first.replaced, *fastgen.accelerate(later).replaced} == set(report.replaced)
    with torch.no_grad():
        torch.testing.assert_close(later(x), expected)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("loaded", ["to_empty", "assign", "init_empty_weights"])
def test_models_are_accelerated_on_the_meta_device_and_loaded_later(kind, loaded):
    x, original = inputs(), made(kind)
    if loaded == "init_empty_weights":
        with pytest.importorskip("accelerate").init_empty_weights():
            model = made(kind)
    else:
        with torch.device("meta"):
            model = made(kind)
    report = fastgen.accelerate(model)
    assert model(x.to("meta")).shape == x.shape
    if loaded == "to_empty":
        model.to_empty(device="cpu").load_state_dict(original.state_dict())
    else:
        model.load_state_dict(original.state_dict(), assign=True)
    torch.testing.assert_close(model(x), original(x))
    assert set(fastgen.restore(model).replaced) == set(report.replaced)
    torch.testing.assert_close(model(x), original(x))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_activation_checkpointing(kind, reentrant):
    model, x = made(kind), inputs().requires_grad_()
    leaves = [x, *model.parameters()]

    def gradients():
        for leaf in leaves:
            leaf.grad = None
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    expected = gradients()
    fastgen.accelerate(model)
    for a, b in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    fastgen.restore(model)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))


@pytest.mark.parametrize("kind", LAYERS)
def test_copies_before_and_after_need_no_fastgen(kind):
    """Those of an accelerated model: test_accelerate.py."""
    model, x = made(kind), inputs()
    expected, file = model(x), io.BytesIO()
    early = pickle.dumps(model), copy.deepcopy(model)
    torch.save(model, file)
    fastgen.accelerate(model)
    assert b"fastgen" in pickle.dumps(model)
    fastgen.restore(model)
    assert pickle.dumps(model).replace(__name__.encode(), b"") == early[0].replace(__name__.encode(), b"")
    file.seek(0)
    for other in (pickle.loads(early[0]), early[1], torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(other(x), expected)
        assert fastgen.accelerate(other).replaced
        torch.testing.assert_close(other(x), expected)
