"""Modified sublayers (hooks, adapters, pruning, parametrizations, quantization) are called once per forward pass."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune

from fastgen import accelerate
from fastgen.models.flow_vae import InverseAutoregressiveFlow
from fastgen.models.gated_layers import GatedLayer
from fastgen.models.sagan import SAGANDiscriminatorBlock, SAGANGeneratorBlock
from fastgen.models.seq2seq import DecoderBlock, EncoderBlock
from fastgen.models.stylegan import ModulatedConv2d
from fastgen.models.transformer_lm import LMBlock
from fastgen.nn import (
    AttentionBlock2d,
    MultiheadAttention,
    RotaryEmbedding,
    SelfAttention2d,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
    WindowAttention2d,
)

pytestmark = pytest.mark.filterwarnings("ignore")

BLOCK = SimpleNamespace(
    width=8,
    depth=1,
    num_heads=2,
    head_dim=4,
    hidden_dim=8,
    mlp_width=8,
    activation="gelu",
    qk_norm=True,
    dropout=0.0,
)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def of_plain_maps(block):
    """A block of SAGAN's without its spectral norms, which other changes do not go beside."""
    for module in list(block.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    return block


def opened(layer):
    nn.init.ones_(layer.gamma)
    return layer


def tokens():
    return randn(2, 3, 8)


def maps(channels=8, size=5):
    return randn(2, channels, size, size)


def tables():
    return RotaryEmbedding(4).tables(3)


VISIBLE = torch.tensor([[True, True, True], [True, True, False]])[:, None, None]
LAYERS = {
    # name: (layer, inputs, its sublayers)
    "SelfAttention2d": (
        lambda: opened(SelfAttention2d(8, key_channels=4, num_heads=2, bias=True)), lambda: (maps(),),
        ("query", "key", "value", "out"),
    ),
    "SelfAttention2d pooled": (
        lambda: opened(SelfAttention2d(8, key_channels=4, pool=2)), lambda: (maps(),), ("query", "key", "value", "out"),
    ),
    "AttentionBlock2d": (
        lambda: AttentionBlock2d(8, num_heads=2, num_groups=2), lambda: (maps(),), ("query", "key", "value", "out"),
    ),
    "WindowAttention2d": (lambda: WindowAttention2d(8, 2, 3, shift=1), lambda: (maps(size=7),), ("qkv", "proj")),
    "MultiheadAttention": (
        lambda: First(MultiheadAttention(8, 2, batch_first=True)), lambda: (tokens(),) * 3, ("layer.out_proj",)
    ),
    "MultiheadAttention sequence first": (
        lambda: First(MultiheadAttention(8, 2)), lambda: (tokens(),) * 3, ("layer.out_proj",)
    ),
    "an accelerated MultiheadAttention": (
        lambda: First(accelerated(nn.MultiheadAttention(8, 2))), lambda: (tokens(),) * 3, ("layer.out_proj",)
    ),
    "TransformerEncoderLayer": (
        lambda: TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True), lambda: (tokens(),),
        ("self_attn.out_proj", "linear1", "linear2"),
    ),
    "TransformerEncoder with padding": (
        lambda: TransformerEncoder(TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True), 1),
        lambda: (tokens(), None, ~VISIBLE[:, 0, 0]),
        ("layers.0.self_attn.out_proj", "layers.0.linear1", "layers.0.linear2"),
    ),
    "TransformerDecoderLayer": (
        lambda: TransformerDecoderLayer(8, 2, 8, 0.0, norm_first=True), lambda: (tokens(), tokens()),
        ("self_attn.out_proj", "multihead_attn.out_proj", "linear1", "linear2"),
    ),
    "LMBlock": (
        lambda: LMBlock(BLOCK), lambda: (tokens(), tables()), ("qkv", "merge", "mlp_in", "mlp_out")
    ),
    "EncoderBlock of a Seq2Seq": (
        lambda: EncoderBlock(BLOCK), lambda: (tokens(), tables(), VISIBLE), ("qkv", "merge", "mlp_in", "mlp_out")
    ),
    "DecoderBlock of a Seq2Seq": (
        lambda: DecoderBlock(BLOCK), lambda: (tokens(), tables(), VISIBLE, tokens()),
        ("qkv", "merge", "query", "key_value", "memory_merge"),
    ),
    "GatedLayer": (
        lambda: GatedLayer(SimpleNamespace(channels=8, skip_channels=4), 2, False), lambda: (tokens(), 2),
        ("taps", "out"),
    ),
    "SAGANGeneratorBlock": (
        lambda: of_plain_maps(SAGANGeneratorBlock(8, 4, 0)).eval(), lambda: (maps(), None),
        ("conv1", "conv2", "shortcut")
    ),
    "SAGANDiscriminatorBlock": (
        lambda: of_plain_maps(SAGANDiscriminatorBlock(8, 4, downsample=True)), lambda: (maps(size=4),),
        ("conv1", "conv2", "shortcut"),
    ),
    "ModulatedConv2d": (lambda: ModulatedConv2d(8, 4, 3, 6), lambda: (maps(), randn(2, 6)), ("convolution", "style")),
    "InverseAutoregressiveFlow": (
        lambda: InverseAutoregressiveFlow(4, 8, 6), lambda: (randn(2, 4), randn(2, 6)),
        ("hidden", "out", "context", "told"),
    ),
}  # fmt: skip


class First(nn.Module):
    """Returns only the output of a layer that also returns attention weights."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *inputs):
        return self.layer(*inputs)[0]


def accelerated(layer):
    accelerate(layer)
    return layer


# --------------------------------------------------------------------------------------------------
# Modifications: functions of the layer, the name of the sublayer, and a list to which the sublayer appends when called.
# They return the factors by which weight and bias are effectively multiplied, or the name of the new weight.


def forward_hook(layer, name, calls):
    layer.get_submodule(name).register_forward_hook(lambda m, i, out: calls.append(1) or 2 * out)
    return 2, 2


def forward_pre_hook(layer, name, calls):
    layer.get_submodule(name).register_forward_pre_hook(lambda m, x: calls.append(1) or (2 * x[0],))
    return 2, 1


def full_backward_hook(layer, name, calls):
    layer.get_submodule(name).register_full_backward_hook(lambda m, i, o: calls.append(1))
    return 1, 1


class Adapted(nn.Module):
    """As in PEFT: weight and bias are delegated to the base layer, forward adds the adapter."""

    def __init__(self, base, calls):
        super().__init__()
        self.base_layer, self.calls = base, calls
        self.adapter = copy.deepcopy(base)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, *inputs):
        self.calls.append(1)
        return self.base_layer(*inputs) + self.adapter(*inputs)


def adapter(layer, name, calls):
    layer.set_submodule(name, Adapted(layer.get_submodule(name), calls))
    return 2, 2


def pruning(layer, name, calls):
    module = layer.get_submodule(name)
    mask = torch.arange(module.weight.numel()).reshape(module.weight.shape) % 3 > 0
    prune.custom_from_mask(module, "weight", mask)
    return mask, 1


def old_spectral_norm(layer, name, calls):
    nn.utils.spectral_norm(layer.get_submodule(name))
    return "weight_orig", 1


def old_weight_norm(layer, name, calls):
    module = nn.utils.weight_norm(layer.get_submodule(name))
    module.weight_g.data *= 2
    return 2, 1


class Doubled(nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def forward(self, weight):
        self.calls.append(1)
        return 2 * weight


def parametrization(layer, name, calls):
    parametrize.register_parametrization(layer.get_submodule(name), "weight", Doubled(calls))
    calls.clear()
    return 2, 1


def parametrization_and_hook(layer, name, calls):
    parametrization(layer, name, calls)
    layer.get_submodule(name).register_forward_hook(lambda m, i, out: None)
    return 2, 1


def own_forward(layer, name, calls):
    """A subclass."""
    module = layer.get_submodule(name)

    def forward(self, *inputs):
        calls.append(1)
        return 2 * base.forward(self, *inputs)

    base = type(module)
    module.__class__ = type("Mine", (base,), {"forward": forward})
    return 2, 2


def patched_forward(layer, name, calls):
    module = layer.get_submodule(name)
    before = module.forward
    module.forward = lambda *inputs: calls.append(1) or 2 * before(*inputs)
    return 2, 2


CHANGES = [
    forward_hook, forward_pre_hook, full_backward_hook, adapter, pruning, old_spectral_norm, old_weight_norm,
    parametrization, parametrization_and_hook, own_forward, patched_forward,
]  # fmt: skip
REFUSED = {  # cannot be called: the layer needs their weights
    ("InverseAutoregressiveFlow", "adapter"): ("hidden", "out"),
    ("ModulatedConv2d", "adapter"): ("convolution",),
    ("ModulatedConv2d", "own_forward"): ("convolution",),
    ("ModulatedConv2d", "patched_forward"): ("convolution",),
}
NOT_DOUBLED = {"convolution"}  # demodulation divides by the norm of the weights, which hooks do not change


def set_weights(original, module, weight, bias):
    with torch.no_grad():
        if weight == "weight_orig":
            original.weight.copy_(module.weight)
        else:
            original.weight.mul_(weight)
        if original.bias is not None:
            original.bias.mul_(bias)


def tensor_of(output):
    return output if isinstance(output, torch.Tensor) else torch.cat([part.flatten() for part in output])


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", LAYERS)
def test_modified_sublayers_are_called_once_and_take_effect(name, change):
    make, inputs, sublayers = LAYERS[name]
    for sublayer in sublayers:
        layer, calls = make(), []
        training = layer.training
        expected = copy.deepcopy(layer)
        weight, bias = change(layer, sublayer, calls)
        if sublayer in REFUSED.get((name, change.__name__), ()):
            with pytest.raises(TypeError, match=f"{sublayer}: expected a"):
                layer(*inputs())
            continue
        counted = bool(calls) or change not in (pruning, old_spectral_norm, old_weight_norm)
        layer.train(training)
        out = tensor_of(layer(*inputs()))
        out.square().sum().backward()
        assert len(calls) == (1 if counted else 0), sublayer
        assert all(p.grad is not None for n, p in layer.named_parameters() if n.startswith(sublayer)), sublayer
        if sublayer in NOT_DOUBLED and change in (forward_hook, forward_pre_hook):
            continue
        set_weights(expected.get_submodule(sublayer), layer.get_submodule(sublayer), weight, bias)
        torch.testing.assert_close(out, tensor_of(expected(*inputs())), msg=lambda m: f"{sublayer}: {m}")  # noqa: B023
        calls.clear()
        with torch.inference_mode():
            out, plain = tensor_of(layer.eval()(*inputs())), tensor_of(expected.eval()(*inputs()))
        if change is not full_backward_hook:
            assert len(calls) == (1 if counted else 0), sublayer
        if "padding" in name:  # padded positions depend on whether they were skipped
            out, plain = out[VISIBLE[:, 0, 0]], plain[VISIBLE[:, 0, 0]]
        torch.testing.assert_close(out, plain)


def called_parts(layer):
    """Maps names to all modules that are called in a forward pass (all but lists)."""
    lists = (nn.ModuleList, parametrize.ParametrizationList)
    return {name: part for name, part in layer.named_modules() if not isinstance(part, lists) and "param" not in name}


@pytest.mark.parametrize("name", LAYERS)
def test_hooks_of_all_sublayers_fire_once(name):
    make, inputs, _ = LAYERS[name]
    layer, fired = make(), []
    parts = called_parts(layer)
    expected = tensor_of(copy.deepcopy(layer)(*inputs()))
    for key, part in parts.items():
        part.register_forward_hook(lambda module, arguments, out, key=key: fired.append(key))
    torch.testing.assert_close(tensor_of(layer(*inputs())), expected)
    assert sorted(fired) == sorted(parts)
    fired.clear()
    with torch.inference_mode():
        layer.eval()(*inputs())
    assert sorted(fired) == sorted(parts)


@pytest.mark.parametrize("name", ["AttentionBlock2d", "TransformerEncoderLayer", "LMBlock"])
def test_global_hooks_fire_for_all_sublayers(name):
    make, inputs, _ = LAYERS[name]
    layer, fired = make(), []
    handle = register_module_forward_hook(lambda module, arguments, out: fired.append(module))
    try:
        layer(*inputs())
    finally:
        handle.remove()
    assert sorted(map(id, fired)) == sorted(map(id, called_parts(layer).values()))


@pytest.mark.parametrize("name", LAYERS)
def test_dynamic_quantization(name):
    make, inputs, sublayers = LAYERS[name]
    layer = make().eval()
    low = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        out, plain = tensor_of(low(*inputs())), tensor_of(layer(*inputs()))
    if "padding" in name:
        out, plain = out[VISIBLE[:, 0, 0]], plain[VISIBLE[:, 0, 0]]
    torch.testing.assert_close(out, plain, atol=0.1, rtol=0.1)
    exact = not any(type(layer.get_submodule(sublayer)) is nn.Linear for sublayer in sublayers)
    assert torch.equal(out, plain) == exact


def test_compiled_layers_call_modified_sublayers():
    layer, x = AttentionBlock2d(8, num_groups=2), maps()
    layer.set_submodule("value", Adapted(layer.value, []))
    layer.query.register_forward_hook(lambda module, arguments, out: 2 * out)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize("spectral", [False, True])
def test_compiled_unmodified_sublayers_are_fused(spectral):
    layer = SelfAttention2d(8, spectral_norm=spectral).eval()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compile(layer, fullgraph=True, backend=keep)(maps())
    (graph,) = graphs
    assert not any(node.target in (nn.functional.conv2d, torch.conv2d) for node in graph.graph.nodes)


class Wrong(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


@pytest.mark.parametrize(
    ("layer", "sublayer", "output", "message"),
    [
        (AttentionBlock2d(8, num_groups=2), "value", randn(2, 25, 4), "24 channels from the Linear, Linear, Wrong"),
        (AttentionBlock2d(8, num_groups=2), "value", (), "value: expected a tensor from the Wrong in Attention"),
        (SelfAttention2d(8), "out", randn(2, 8, 3, 3), r"out: expected an output of \(2, 25\) tokens from the Wrong"),
        (WindowAttention2d(8, 2, 3), "qkv", randn(2, 25, 4), "qkv: expected 24 channels from the Wrong in WindowAtt"),
        (AttentionBlock2d(8, num_groups=2), "out", randn(2, 25, 4), "out: expected .* like the residual"),
    ],
)
def test_invalid_sublayer_outputs_raise(layer, sublayer, output, message):
    layer.set_submodule(sublayer, Wrong(output))
    with pytest.raises((TypeError, ValueError), match=message):
        layer(maps())


def test_convolutions_other_than_1x1_are_called():
    layer = opened(SelfAttention2d(8))
    layer.query = nn.Conv2d(8, 1, 3, padding=1)
    layer.key = nn.Conv2d(8, 1, 1, bias=True)
    x = maps()
    query, key, value = (part(x).flatten(2) for part in (layer.query, layer.key, layer.value))
    attended = value @ (query.mT @ key).softmax(-1).mT
    torch.testing.assert_close(layer(x), x + layer.out(attended.unflatten(2, x.shape[2:])))


def test_mixed_biases():
    layer = AttentionBlock2d(8, num_groups=2)
    layer.key = nn.Linear(8, 8, bias=False)
    with_zeros = copy.deepcopy(layer)
    with_zeros.key.bias = nn.Parameter(torch.zeros(8))
    torch.testing.assert_close(layer(maps()), with_zeros(maps()))


# --------------------------------------------------------------------------------------------------
# torch's fast path, which calls no sublayer


def padded_encoder():
    layer = TransformerEncoderLayer(8, 2, 8, 0.5, batch_first=True)
    return TransformerEncoder(layer, 1).eval().requires_grad_(False)


def other_block(encoder):
    encoder.layers[0]._ff_block = lambda x: x + 1


def other_activation(encoder):
    encoder.layers[0].activation = torch.tanh


def dropout_in_training(encoder):
    encoder.layers[0].dropout1.train()


@pytest.mark.parametrize("change", [other_block, other_activation, dropout_in_training], ids=lambda f: f.__name__)
def test_padding_is_not_skipped_if_the_fast_path_would_ignore(change):
    encoder, x, padding = padded_encoder(), tokens(), ~VISIBLE[:, 0, 0]
    change(encoder)
    torch.manual_seed(0)
    out = encoder(x, src_key_padding_mask=padding)
    encoder.use_nested_tensor = False
    torch.manual_seed(0)
    assert torch.equal(out, encoder(x, src_key_padding_mask=padding))
    nested = torch.nested.nested_tensor([x[0], x[1, :2]])
    with pytest.raises(RuntimeError, match="src: expected a padded tensor and src_key_padding_mask"):
        encoder.layers[0](nested)


def test_nested_tensors_with_modified_out_proj_raise():
    layer = MultiheadAttention(8, 2, batch_first=True).eval().requires_grad_(False)
    layer.out_proj.register_forward_hook(lambda module, arguments, out: 2 * out)
    nested = torch.nested.nested_tensor([randn(3, 8), randn(2, 8)])
    with pytest.raises(RuntimeError, match="not call out_proj"):
        layer(nested, nested, nested)


def test_reverse_over_forward_through_a_hooked_norm():
    layer = TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True).double()
    x, t = tokens().double(), randn(3, 2, 8).transpose(0, 1).double()

    def gradient_of_tangent(layer):
        return torch.func.grad(lambda x: torch.func.jvp(layer, (x,), (t,))[1].square().sum())(x)

    expected = gradient_of_tangent(layer)
    layer.norm1.register_forward_hook(lambda module, arguments, out: None)
    torch.testing.assert_close(gradient_of_tangent(layer), expected)
