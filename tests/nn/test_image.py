"""Attention layers of feature maps against plain PyTorch implementations."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, jvp

from fastgen.losses import r1_penalty
from fastgen.nn import AttentionBlock2d, AttentionGate2d, SelfAttention2d, WindowAttention2d
from fastgen.testing import assert_accurate

# --------------------------------------------------------------------------------------------------
# The formulas


def heads_of(flat, heads):
    """(B, H D, N) -> (B, H, N, D)."""
    return flat.unflatten(1, (heads, -1)).transpose(2, 3)


def attend(query, key, value, scale, bias=0.0):
    weights = (scale * query @ key.transpose(-2, -1) + bias).softmax(-1)
    return (weights @ value).transpose(2, 3).flatten(1, 2)


def plain_self_attention(layer, x):
    query, key, value = layer.query(x), layer.key(x), layer.value(x)
    if layer.pool:
        key, value = F.max_pool2d(key, layer.pool), F.max_pool2d(value, layer.pool)
    parts = [heads_of(part.flatten(2), layer.num_heads) for part in (query, key, value)]
    out = attend(*parts, layer.scale).unflatten(2, x.shape[2:])
    return x + layer.gamma * layer.out(out)


def plain_block(layer, x):
    tokens = layer.norm(x).flatten(2).transpose(1, 2)
    parts = [
        heads_of(linear(tokens).transpose(1, 2), layer.num_heads) for linear in (layer.query, layer.key, layer.value)
    ]
    out = attend(*parts, (layer.channels // layer.num_heads) ** -0.5)
    return x + layer.out(out.transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


def plain_gate(layer, x):
    made = layer.map(x)
    if made.shape[2:] != x.shape[2:]:
        made = F.interpolate(made, size=x.shape[2:], mode="bilinear", align_corners=False)
    return x * made + x


def plain_window(layer, x):
    """Attention of all positions to all, with the windows as a mask."""
    size, places = x.shape[2:], []
    for side, extent, shift in zip(size, layer.window_size, layer.shift, strict=True):
        padded = (side + extent - 1) // extent * extent
        moved = shift if padded > extent else 0
        rolled = [(position - moved) % padded for position in range(side)]
        places.append([(r // extent, position < moved, r % extent) for position, r in enumerate(rolled)])
    positions = [(y, x) for y in places[0] for x in places[1]]
    heads, (height, width) = layer.num_heads, layer.window_size
    table = layer.relative_position_bias_table.unflatten(0, (2 * height - 1, 2 * width - 1))
    apart = torch.full((heads,), -torch.inf, dtype=x.dtype)
    bias = torch.stack(
        [
            torch.stack([
                table[a[2] - c[2] + height - 1, b[2] - d[2] + width - 1] if (a[:2], b[:2]) == (c[:2], d[:2]) else apart
                for c, d in positions
            ])
            for a, b in positions
        ]
    ).permute(2, 0, 1)  # fmt: skip
    tokens = x.flatten(2).transpose(1, 2)
    parts = [heads_of(part.transpose(1, 2), heads) for part in layer.qkv(tokens).chunk(3, dim=2)]
    out = attend(*parts, (layer.channels // heads) ** -0.5, bias)
    return layer.proj(out.transpose(1, 2)).transpose(1, 2).unflatten(2, size)


PLAIN = {
    SelfAttention2d: plain_self_attention,
    AttentionBlock2d: plain_block,
    AttentionGate2d: plain_gate,
    WindowAttention2d: plain_window,
}
LAYERS = {
    "self": (lambda: SelfAttention2d(16), (2, 16, 5, 6)),
    "self, odd channels": (lambda: SelfAttention2d(7, bias=True, key_channels=3, value_channels=5), (2, 7, 3, 1)),
    "self, pooled": (lambda: SelfAttention2d(16, pool=2, bias=True), (2, 16, 4, 6)),
    "self, pooled, heads, odd sides": (
        lambda: SelfAttention2d(12, pool=2, num_heads=2, key_channels=4, value_channels=6, scale=0.7),
        (1, 12, 5, 3),
    ),
    "block": (lambda: AttentionBlock2d(8, num_groups=4), (2, 8, 3, 5)),
    "block, heads, no bias": (lambda: AttentionBlock2d(12, head_dim=3, num_groups=3, bias=False), (1, 12, 4, 4)),
    "gate": (lambda: AttentionGate2d(5), (2, 5, 4, 3)),
    "gate, strided": (
        lambda: AttentionGate2d(4, hidden_channels=3, map_channels=4, stride=2, kernel_size=5),
        (2, 4, 5, 7),
    ),
    "window": (lambda: WindowAttention2d(8, 2, 2), (2, 8, 4, 6)),
    "window, shifted": (lambda: WindowAttention2d(6, 3, 3, shift=1), (2, 6, 6, 9)),
    "window, shifted, padded": (lambda: WindowAttention2d(4, 2, (3, 4), shift=(2, 1), bias=False), (2, 4, 7, 6)),
    "window, larger than the map": (lambda: WindowAttention2d(4, 1, 5, shift=2), (1, 4, 3, 7)),
}  # fmt: skip
TINY = {
    "self": (lambda: SelfAttention2d(4, key_channels=2, value_channels=2, bias=True), (1, 4, 2, 2)),
    "self, pooled": (lambda: SelfAttention2d(3, pool=2, key_channels=1, value_channels=2), (1, 3, 2, 4)),
    "block": (lambda: AttentionBlock2d(4, num_groups=2, num_heads=2), (1, 4, 2, 2)),
    "gate": (lambda: AttentionGate2d(2, stride=2, hidden_channels=2, kernel_size=1), (1, 2, 3, 2)),
    "window": (lambda: WindowAttention2d(2, 1, 2, shift=1), (1, 2, 2, 4)),
}


def made(case, table=LAYERS, dtype=torch.float64, gain=0.5):
    """A layer with random parameters (none is left at its initial 0), and an input."""
    make, shape = table[case]
    layer = make().to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * (gain if parameter.dim() > 1 else 1.0))
    return layer, torch.randn(shape, dtype=dtype)


def plain(layer, x):
    return PLAIN[type(layer)](layer, x)


# --------------------------------------------------------------------------------------------------
# Values and derivatives


@pytest.mark.parametrize("case", LAYERS)
def test_outputs_and_gradients_match_the_formula(case):
    layer, x = made(case)
    leaves = [x.requires_grad_(), *layer.parameters()]
    ours, expected = layer(x), plain(layer, x)
    assert ours.shape == x.shape
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(x)
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", LAYERS)
def test_r1_penalty_matches_the_formula(case):
    layer, x = made(case)
    x.requires_grad_()

    def gradients(forward):
        scores = forward(x).tanh().sum((1, 2, 3))
        return torch.autograd.grad(r1_penalty(scores, x), list(layer.parameters()), allow_unused=True)

    for a, b in zip(gradients(layer), gradients(lambda x: plain(layer, x)), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("case", LAYERS)
def test_jvp_matches_the_formula(case):
    layer, x = made(case)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    directions = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    primals, tangents = (parameters, x), (directions, torch.randn_like(x))

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return plain(self.layer, x)

    out, tangent = jvp(lambda p, x: functional_call(layer, p, x), primals, tangents)
    prefixed = tuple({f"layer.{name}": t for name, t in group.items()} for group in (parameters, directions))
    expected = jvp(lambda p, x: functional_call(Plain(), p, x), (prefixed[0], x), (prefixed[1], tangents[1]))
    torch.testing.assert_close(out, expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(tangent, expected[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("case", TINY)
def test_derivatives_match_finite_differences(case, check):
    layer, x = made(case, TINY)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
    assert check(lambda x, *p: functional_call(layer, dict(zip(names, p, strict=True)), x), leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["self", "self, pooled", "block, heads, no bias", "gate", "window, shifted, padded"])
def test_low_precision_accuracy(case, dtype):
    layer, x = made(case, gain=0.2)
    low = copy.deepcopy(layer).to(dtype)
    rounded = copy.deepcopy(low).double()
    upstream = torch.randn_like(x).to(dtype)
    results = []
    for module, forward in ((low, low), (low, lambda x: plain(low, x)), (rounded, lambda x: plain(rounded, x))):
        kind = next(module.parameters()).dtype
        leaf = x.to(dtype).to(kind).requires_grad_()
        out = forward(leaf)
        results.append((out, *torch.autograd.grad(out, [leaf, *module.parameters()], upstream.to(kind))))
    for ours, peer, exact in zip(*results, strict=True):
        assert_accurate(ours, peer, exact, case)


@pytest.mark.parametrize("case", LAYERS)
def test_autocast(case):
    layer, x = made(case, dtype=torch.float32)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    if not isinstance(layer, WindowAttention2d):  # ends with a residual, which stays float32
        assert out.dtype == torch.float32
    assert out.isfinite().all()
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item())
    out.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("case", LAYERS)
def test_memory_formats_and_strides(case):
    layer, x = made(case)
    expected = layer(x)
    padded = torch.randn(*x.shape[:3], 2 * x.size(3), dtype=x.dtype)
    padded[..., ::2] = x
    for other in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().mT,
        padded[..., ::2],
    ):
        torch.testing.assert_close(layer(other), expected, rtol=1e-10, atol=1e-10)


def test_saved_memory_is_linear_in_the_number_of_positions():
    def kept(side, layer):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = layer(torch.randn(1, 8, side, side))
        assert out.requires_grad
        return sum(sizes.values())

    for layer in (SelfAttention2d(8), SelfAttention2d(8, pool=2), AttentionBlock2d(8, num_groups=4)):
        assert kept(32, layer) < 4.5 * kept(16, layer)
        assert kept(32, layer) < 32**4


# --------------------------------------------------------------------------------------------------
# Layer-specific behavior


def test_self_attention_defaults_and_identity_initialization():
    layer, x = SelfAttention2d(64), torch.randn(1, 64, 3, 3)
    assert torch.equal(layer(x), x)
    assert layer.query.weight.shape == (8, 64, 1, 1)
    assert layer.value.weight.shape == (32, 64, 1, 1)
    assert SelfAttention2d(4).query.weight.shape == (1, 4, 1, 1)
    assert all(conv.bias is None for conv in (layer.query, layer.key, layer.value, layer.out))


@pytest.mark.parametrize("pool", [False, 2])
def test_spectral_norm_limits_the_largest_singular_value_to_one(pool):
    layer, x = SelfAttention2d(16, spectral_norm=True, pool=pool), torch.randn(1, 16, 4, 4)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    before = next(layer.value.buffers()).clone()
    layer(x)
    assert not torch.equal(before, next(layer.value.buffers())), "a step of the power iteration for each forward"
    for _ in range(100):
        layer(x)
    for projection in (layer.query, layer.key, layer.value, layer.out):
        assert torch.linalg.matrix_norm(projection.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)
    layer.eval()
    torch.testing.assert_close(layer(x), plain(layer, x))
    assert torch.equal(layer(x), layer(x))


# --------------------------------------------------------------------------------------------------
# State dicts


@pytest.mark.parametrize("case", LAYERS)
def test_state_dict_round_trip(case):
    layer, x = made(case)
    other = LAYERS[case][0]().double()
    assert not torch.equal(other(x), layer(x))
    assert other.load_state_dict(layer.state_dict()) == nn.Module().load_state_dict({})  # all keys match
    assert torch.equal(other(x), layer(x))


def test_state_dict_keys():
    assert [*SelfAttention2d(8).state_dict()] == ["gamma", *(f"{n}.weight" for n in ("query", "key", "value", "out"))]
    parts = ("norm", "query", "key", "value", "out")
    assert [*AttentionBlock2d(32).state_dict()] == [f"{n}.{p}" for n in parts for p in ("weight", "bias")]
    torchvision_keys = {"relative_position_bias_table", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    assert {*WindowAttention2d(8, 2, 7).state_dict()} == torchvision_keys


class QueryConvSAGAN(nn.Module):
    """SAGAN block of many repositories, without a convolution after attention."""

    def __init__(self, channels):
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // 8, 1)
        self.key_conv = nn.Conv2d(channels, channels // 8, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, x):
        query, key, value = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        attention = torch.bmm(query.transpose(1, 2), key).softmax(-1)
        return self.gamma * torch.bmm(value, attention.transpose(1, 2)).view_as(x) + x


class BigGAN(nn.Module):
    def __init__(self, channels):
        super().__init__()
        sizes = {"theta": (channels, channels // 8), "phi": (channels, channels // 8), "g": (channels, channels // 2)}
        for name, (in_channels, out_channels) in {**sizes, "o": (channels // 2, channels)}.items():
            setattr(self, name, nn.Conv2d(in_channels, out_channels, 1, bias=False))
        self.gamma = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        theta, phi, g = self.theta(x).flatten(2), F.max_pool2d(self.phi(x), [2, 2]), F.max_pool2d(self.g(x), [2, 2])
        beta = F.softmax(torch.bmm(theta.transpose(1, 2), phi.flatten(2)), -1)
        return self.gamma * self.o(torch.bmm(g.flatten(2), beta.transpose(1, 2)).unflatten(2, x.shape[2:])) + x


class LatentDiffusion(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        for name in ("q", "k", "v", "proj_out"):
            setattr(self, name, nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2) for conv in (self.q, self.k, self.v))
        weights = (torch.bmm(q.transpose(1, 2), k) * q.size(1) ** -0.5).softmax(2)
        return x + self.proj_out(torch.bmm(v, weights.transpose(1, 2)).view_as(x))


class Diffusers(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.group_norm = nn.GroupNorm(32, channels, eps=1e-6)
        for name in ("to_q", "to_k", "to_v"):
            setattr(self, name, nn.Linear(channels, channels))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        out = F.scaled_dot_product_attention(*(f(tokens) for f in (self.to_q, self.to_k, self.to_v)))
        return x + self.to_out[0](out).transpose(1, 2).view_as(x)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (lambda: QueryConvSAGAN(16), lambda: SelfAttention2d(16, value_channels=16, bias=True)),
        (lambda: BigGAN(16), lambda: SelfAttention2d(16, pool=2)),
        (lambda: LatentDiffusion(32), lambda: AttentionBlock2d(32)),
        (lambda: Diffusers(64), lambda: AttentionBlock2d(64)),
    ],
    ids=["query_conv", "BigGAN", "latent diffusion", "diffusers"],
)
def test_state_dicts_of_other_implementations(theirs, ours, nested):
    theirs, ours = theirs(), ours()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    if nested:
        theirs, ours = nn.Sequential(nn.Identity(), theirs), nn.Sequential(nn.Identity(), ours)
    saved = theirs.state_dict()
    kept = {**saved}
    ours.load_state_dict(saved)
    assert saved.keys() == kept.keys(), "the caller's mapping is not modified"
    channels = next(module.channels for module in ours.modules() if hasattr(module, "channels"))
    x = torch.randn(2, channels, 4, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_swin_state_dict_with_relative_position_index_loads():
    layer = WindowAttention2d(8, 2, 3)
    saved = {**layer.state_dict(), "relative_position_index": torch.zeros(81, dtype=torch.long)}
    layer.load_state_dict(saved)
    expected = torch.tensor([4 * 5 // 2 + 2, 12 - 1, 12 - 5])  # of (0, 0), (0, 1) and (1, 0), relative to (0, 0)
    assert torch.equal(layer.relative_position_index[0, [0, 1, 3]], expected)


@pytest.mark.parametrize(
    ("layer", "state", "text"),
    [
        (SelfAttention2d(8), nn.MultiheadAttention(8, 1), r"expected the entries gamma, .*theta.*got in_proj_.*rename"),
        (AttentionBlock2d(32), SelfAttention2d(32), r"expected the entries norm.weight, .*got gamma"),
        (WindowAttention2d(8, 2, 3), nn.Linear(8, 8), r"expected the entries .*qkv.weight.*got weight, bias"),
        (SelfAttention2d(8), SelfAttention2d(8, spectral_norm=True), r"got .*parametrizations.*built with the same"),
        (SelfAttention2d(8), SelfAttention2d(16), "size mismatch for query.weight"),
        (WindowAttention2d(8, 2, 3), WindowAttention2d(8, 2, 4), "size mismatch for relative_position_bias_table"),
    ],
)  # fmt: skip
def test_mismatched_state_dicts_raise(layer, state, text):
    with pytest.raises(RuntimeError, match=text):
        layer.load_state_dict(state.state_dict())


# --------------------------------------------------------------------------------------------------
# Copies, export, compilation


@pytest.mark.parametrize("case", ["self", "self, pooled", "block", "gate, strided", "window, shifted, padded"])
class TestModules:
    def test_copies(self, case):
        layer, x = made(case)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))

    def test_export(self, case):
        layer, x = made(case)
        with torch.no_grad():
            torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))

    def test_compile(self, case):
        layer, x = made(case)
        torch._dynamo.reset()
        code = torch.compile(layer, backend="aot_eager", fullgraph=True)
        leaves = [x.requires_grad_(), *layer.parameters()]
        torch.testing.assert_close(code(x), layer(x))
        for a, b in zip(*(torch.autograd.grad(f(x).sin().sum(), leaves) for f in (code, layer)), strict=True):
            torch.testing.assert_close(a, b)

    def test_repr(self, case):
        layer, x = made(case)
        assert type(layer).__name__ in repr(layer)
        assert str(x.size(1)) in repr(layer)


def test_factory_arguments():
    for make in (
        lambda **k: SelfAttention2d(8, **k),
        lambda **k: AttentionBlock2d(8, num_groups=2, **k),
        lambda **k: AttentionGate2d(8, **k),
        lambda **k: WindowAttention2d(8, 2, 3, **k),
    ):
        layer = make(device="meta", dtype=torch.float16)
        assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}


# --------------------------------------------------------------------------------------------------
# Errors

X = torch.randn(1, 8, 4, 4)
ERRORS = [
    (lambda: SelfAttention2d(0), ValueError, "channels: expected a positive integer, got 0"),
    (lambda: SelfAttention2d(64, num_heads=3), ValueError, "num_heads: expected a divisor of key_channels = 8, got 3"),
    (lambda: SelfAttention2d(64, num_heads=8, value_channels=20), ValueError, "divisor of value_channels = 20, got 8"),
    (lambda: SelfAttention2d(8, pool=0), ValueError, "pool: expected a positive integer, got 0"),
    (lambda: SelfAttention2d(8, pool=True), ValueError, "pool: expected a positive integer, got True"),
    (lambda: SelfAttention2d(8, pool=2)(X[..., :1]), ValueError, "x: expected height and width of at least pool = 2"),
    (lambda: SelfAttention2d(16)(X), ValueError, r"x: expected \(B, C, H, W\) with C = 16, got \(1, 8, 4, 4\)"),
    (lambda: SelfAttention2d(8)(X[0]), ValueError, r"x: expected \(B, C, H, W\) with C = 8, got \(8, 4, 4\)"),
    (lambda: SelfAttention2d(8)(X.long()), TypeError, "x: expected a floating-point tensor, got torch.int64"),
    (lambda: SelfAttention2d(8)(X.double()), TypeError, "weight: expected the dtype of x, torch.float64"),
    (lambda: SelfAttention2d(8)([1]), TypeError, "x: expected a tensor, got list"),
    (lambda: AttentionBlock2d(48), ValueError, "num_groups: expected a divisor of channels = 48, got 32"),
    (lambda: AttentionBlock2d(64, num_heads=5), ValueError, "num_heads: expected a divisor of channels = 64, got 5"),
    (lambda: AttentionBlock2d(64, head_dim=5), ValueError, "head_dim: expected a divisor of channels = 64, got 5"),
    (lambda: AttentionBlock2d(64, head_dim=8, num_heads=4), ValueError, "num_heads: expected channels / head_dim = 8"),
    (lambda: AttentionBlock2d(32)(X), ValueError, r"x: expected \(B, C, H, W\) with C = 32"),
    (lambda: AttentionGate2d(8, kernel_size=4), ValueError, "kernel_size: expected an odd number, got 4"),
    (lambda: AttentionGate2d(8, map_channels=3), ValueError, "map_channels: expected 1 or channels = 8, got 3"),
    (lambda: AttentionGate2d(8, stride=0), ValueError, "stride: expected a positive integer, got 0"),
    (lambda: AttentionGate2d(4)(X), ValueError, r"x: expected \(B, C, H, W\) with C = 4"),
    (lambda: WindowAttention2d(8, 3, 4), ValueError, "num_heads: expected a divisor of channels = 8, got 3"),
    (lambda: WindowAttention2d(8, 2, 0), ValueError, "window_size: expected an integer >= 1 or a pair of them, got 0"),
    (lambda: WindowAttention2d(8, 2, (3, 3, 3)), ValueError, "window_size: expected an integer >= 1 or a pair of them"),
    (lambda: WindowAttention2d(8, 2, 4.0), ValueError, "window_size: .*integer >= 1 or a pair of them, got 4.0"),
    (lambda: WindowAttention2d(8, 2, 4, shift=4), ValueError, r"shift: expected less than window_size = \(4, 4\)"),
    (lambda: WindowAttention2d(8, 2, 4, shift=-1), ValueError, "shift: .* an integer >= 0 or a pair of them, got -1"),
    (lambda: WindowAttention2d(8, 2, 4)(X[:, :, :0]), ValueError, "x: expected height and width of at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), ERRORS)
def test_invalid_arguments_raise(call, error, text):
    with pytest.raises(error, match=text):
        call()
