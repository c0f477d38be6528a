"""Sinusoidal, rotary and relative position layers against element-wise implementations of the papers' formulas."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, jvp, vmap

from fastgen import functional
from fastgen.losses import r1_penalty
from fastgen.nn import KVCache, PositionalEncoding, RelativePositionBias, RotaryEmbedding

# --------------------------------------------------------------------------------------------------
# Sinusoidal encoding


def sinusoid(p, channel, dim, base=10000.0):
    angle = p / base ** ((channel - channel % 2) / dim)
    return math.cos(angle) if channel % 2 else math.sin(angle)


def sinusoids(positions, dim, base=10000.0):
    return torch.tensor([[sinusoid(p, c, dim, base) for c in range(dim)] for p in positions], dtype=torch.float64)


@pytest.mark.parametrize("base", [10000.0, 50.0])
@pytest.mark.parametrize("dim", [1, 2, 5, 8])
def test_sinusoidal_encoding_matches_the_paper(dim, base):
    x = torch.randn(3, 7, dim, dtype=torch.float64)
    layer = PositionalEncoding(dim, 20, base=base).double()
    torch.testing.assert_close(layer(x), x + sinusoids(range(7), dim, base), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x, 4), x + sinusoids(range(4, 11), dim, base), rtol=1e-12, atol=1e-12)
    later = PositionalEncoding(dim, 20, base=base, batch_first=False).double()
    torch.testing.assert_close(later(x.transpose(0, 1), 13), (x + sinusoids(range(13, 20), dim, base)).transpose(0, 1))


@pytest.mark.parametrize("batch_first", [True, False])
def test_sinusoidal_encoding_at_given_positions(batch_first):
    layer = PositionalEncoding(4, 20, batch_first=batch_first).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    shared, per_sample = torch.tensor([5, 0, 19]), torch.tensor([[1, 2, 3], [7, 0, 7]])
    given = x if batch_first else x.transpose(0, 1)
    for positions, table in (
        (shared, sinusoids(shared.tolist(), 4)),
        (per_sample, torch.stack([sinusoids(row, 4) for row in per_sample.tolist()])),
    ):
        out = layer(given, positions=positions)
        torch.testing.assert_close(out if batch_first else out.transpose(0, 1), x + table, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_table_is_recomputed_exactly_after_dtype_changes(dtype):
    layer = PositionalEncoding(6, 3000).bfloat16().to(dtype)
    exact = sinusoids([2999], 6)[0]
    assert torch.equal(layer.table[2999], exact.to(dtype))
    assert layer(torch.zeros(1, 5, 6, dtype=dtype)).dtype == dtype
    assert layer.state_dict() == {}
    empty = PositionalEncoding(6, 3000, device="meta").to_empty(device="cpu")
    assert torch.equal(empty.table[2999], exact.float())


def test_encoding_preserves_the_dtype_of_tokens():
    layer, x = PositionalEncoding(4), torch.zeros(1, 3, 4, dtype=torch.bfloat16)
    assert torch.equal(layer(x)[0], sinusoids(range(3), 4).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.float()).dtype == torch.float32


def test_dropout_is_applied_in_training_only():
    layer, x = PositionalEncoding(8, dropout=0.5), torch.randn(4, 50, 8)
    share = (layer(x) == 0).float().mean().item()
    assert 0.4 < share < 0.6
    assert not (layer.eval()(x) == 0).any()


@pytest.mark.parametrize("positions", [(-1, 0), (0, 7), (2, -7)])
def test_out_of_range_positions_raise(positions):
    message = rf"positions: expected 0 to max_len - 1 = 6, got {min(positions)} to {max(positions)}"
    with pytest.raises(ValueError, match=message):
        PositionalEncoding(4, 7)(torch.zeros(1, 2, 4), positions=torch.tensor(positions))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_positions_of_any_integer_dtype(dtype):
    layer, x = PositionalEncoding(4, 7), torch.zeros(1, 2, 4)
    expected = layer(x, positions=torch.tensor([1, 0]))
    assert torch.equal(layer(x, positions=torch.tensor([1, 0], dtype=dtype)), expected)


# --------------------------------------------------------------------------------------------------
# Rotary embedding


def rotation(x, positions, dim, base=10000.0, interleaved=False, scaling=1.0):
    """Multiplies each pair of channels by e^(i angle)."""
    result = x.clone()
    for i in range(dim // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
        for batch in range(x.size(0)):
            for n in range(x.size(2)):
                angle = positions[batch][n] / scaling / base ** (2 * i / dim)
                rotated = torch.complex(x[batch, :, n, a], x[batch, :, n, b]) * complex(
                    math.cos(angle), math.sin(angle)
                )
                result[batch, :, n, a], result[batch, :, n, b] = rotated.real, rotated.imag
    return result


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "base", "scaling"), [(6, 10000.0, 1.0), (4, 500.0, 1.0), (2, 10000.0, 4.0)])
def test_rotary_embedding_matches_the_paper(dim, base, scaling, interleaved):
    rotary = RotaryEmbedding(dim, base=base, interleaved=interleaved, scaling=scaling)
    query, key = (torch.randn(2, heads, 3, 6, dtype=torch.float64) for heads in (4, 2))
    per_sample = torch.tensor([[4, 5, 6], [0, 9, 100]])
    for given, positions in (
        ({}, [[0, 1, 2]] * 2),
        ({"offset": 7}, [[7, 8, 9]] * 2),
        ({"positions": per_sample[1]}, per_sample[[1, 1]].tolist()),
        ({"positions": per_sample}, per_sample.tolist()),
    ):
        for ours, x in zip(rotary(query, key, **given), (query, key), strict=True):
            expected = rotation(x, positions, dim, base, interleaved, scaling)
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_rotary_scores_depend_on_relative_positions_only():
    rotary = RotaryEmbedding(8)
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        rotated, _ = rotary(query, key, offset=i)
        return (rotated * rotary(query, key, offset=j)[1]).sum()

    torch.testing.assert_close(score(3, 1), score(1002, 1000))
    assert abs(score(3, 1) - score(1, 3)) > 1e-6


def test_rotary_tables_are_exact_float32_for_any_module_dtype():
    rotary, frequencies = RotaryEmbedding(4).bfloat16(), torch.tensor([1.0, 0.01], dtype=torch.float64)
    for length, offset in ((3, 0), (5, 100_000), (0, 0), (1, 1)):
        cos, sin = rotary.tables(length, offset)
        angles = torch.outer(torch.arange(offset, offset + length).double(), frequencies)
        torch.testing.assert_close(cos, angles.cos().float(), rtol=0, atol=1e-7)
        torch.testing.assert_close(sin, angles.sin().float(), rtol=0, atol=1e-7)
    low = torch.randn(1, 2, 3, 4, dtype=torch.bfloat16)
    assert rotary(low, low)[0].dtype == torch.bfloat16


def test_rotary_table_cache_is_usable_in_training_and_not_copied():
    rotary = RotaryEmbedding(4)
    with torch.inference_mode():
        rotary.tables(100)
    (tables,) = rotary._cache.values()
    rotary.tables(50, 20)
    assert list(rotary._cache.values()) == [tables]
    query = torch.randn(1, 1, 100, 4, requires_grad=True)
    rotary(query, query)[0].sum().backward()  # inference tensors cannot be saved for backward
    assert len(pickle.dumps(rotary)) < 2000
    assert copy.deepcopy(rotary)._cache == {}
    assert rotary.state_dict() == {}


def test_rotary_tables_in_qkv_projection():
    rotary, x, weight = RotaryEmbedding(4), torch.randn(2, 5, 6).double(), torch.randn(12, 6).double()
    tables = rotary.tables(5, 2, dtype=torch.float64)
    heads, dims = (1, 1, 1), (4, 4, 4)
    query, key, value = functional.qkv_projection(x, weight, heads=heads, head_dims=dims, rotary=tables)
    plain = functional.qkv_projection(x, weight, heads=heads, head_dims=dims)
    expected = rotary(*plain[:2], offset=2)
    for a, b in zip((query, key, value), (*expected, plain[2]), strict=True):
        torch.testing.assert_close(a, b)


def test_rotary_tables_are_copies():
    rotary = RotaryEmbedding(4)
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    expected = rotary(query, key)
    for table in rotary.tables(3):
        table.zero_()
    assert torch.equal(rotary(query, key)[0], expected[0])
    assert torch.equal(rotary.tables(3)[0][0], torch.ones(2))


def test_fake_rotary_tables_are_not_cached():
    rotary, x = RotaryEmbedding(4), torch.randn(1, 2, 3, 4)
    with FakeTensorMode() as mode:
        rotary(mode.from_tensor(x), mode.from_tensor(x))
    assert torch.equal(rotary(x, x)[0], RotaryEmbedding(4)(x, x)[0])
    with mode:
        rotary(mode.from_tensor(x), mode.from_tensor(x))


def test_negative_positions_invert_the_rotation():
    rotary = RotaryEmbedding(4)
    x = torch.randn(1, 1, 3, 4).double()
    there, _ = rotary(x, x, positions=torch.tensor([1, 5, 9]))
    back, _ = rotary(there, there, positions=torch.tensor([-1, -5, -9]))
    torch.testing.assert_close(back, x)


# --------------------------------------------------------------------------------------------------
# Relative bias


def t5_bucket(distance, bidirectional, num_buckets, max_distance):
    """Bucket of key position minus query position (Raffel et al. 2020 and T5's code)."""
    bucket = 0
    if bidirectional:
        num_buckets //= 2
        bucket = num_buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = -min(distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return bucket + distance
    # In float32 as in T5: rounding decides at the edges of buckets.
    ratio = torch.log(torch.tensor(float(distance)) / exact) / math.log(max_distance / exact)
    return bucket + min(exact + int(ratio * (num_buckets - exact)), num_buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (4, 3)])
@pytest.mark.parametrize(("n", "m", "offset"), [(5, 7, 0), (300, 290, 0), (1, 200, 199), (3, 2, 40)])
def test_relative_position_buckets_match_t5(n, m, offset, num_buckets, max_distance, bidirectional):
    layer = RelativePositionBias(1, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(num_buckets)[:, None])
    bucket = {d: t5_bucket(d, bidirectional, num_buckets, max_distance) for d in range(-n - offset, m + 1)}
    expected = torch.tensor([[float(bucket[j - i - offset]) for j in range(m)] for i in range(n)])
    assert torch.equal(layer(n, m, offset)[0], expected)
    assert torch.equal(layer(n, m, torch.tensor([offset]))[0], expected)


def test_relative_bias_gradient_sums_over_pairs():
    layer = RelativePositionBias(3, num_buckets=8, max_distance=16).double()
    upstream = torch.randn(3, 5, 9, dtype=torch.float64)
    (ours,) = torch.autograd.grad(layer(5, 9, 2), layer.weight, upstream)
    expected = torch.zeros(8, 3, dtype=torch.float64)
    for i in range(5):
        for j in range(9):
            expected[t5_bucket(j - i - 2, True, 8, 16)] += upstream[:, i, j]
    torch.testing.assert_close(ours, expected)


def test_relative_bias_as_attention_mask():
    layer = RelativePositionBias(2, num_buckets=8).double()
    query, key, value = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64)
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=layer(5, 5), scale=1.0)
    expected = (query @ key.mT + layer(5, 5)).softmax(-1) @ value
    torch.testing.assert_close(out, expected)
    scores = torch.autograd.grad(out.sin().sum(), layer.weight)[0]
    torch.testing.assert_close(scores, torch.autograd.grad(expected.sin().sum(), layer.weight)[0])


# --------------------------------------------------------------------------------------------------
# All layers


def cases():
    x, heads = torch.randn(2, 3, 5), torch.randn(2, 2, 3, 4)
    positions = torch.tensor([[0, 1, 2], [5, 6, 7]])
    yield "sinusoids", PositionalEncoding(5), (x,), {}
    yield "sinusoids at positions", PositionalEncoding(5), (x,), {"positions": positions}
    yield "rotary", RotaryEmbedding(4), (heads, heads.flip(0)), {"offset": 3}
    yield "rotary at positions", RotaryEmbedding(2, interleaved=True), (heads, heads.flip(0)), {"positions": positions}
    yield "bias", RelativePositionBias(2), (3, 4), {}


class Biased(nn.Module):
    """Wrapper with a tensor argument, as torch.export requires."""

    def __init__(self, bias):
        super().__init__()
        self.bias = bias

    def forward(self, scores):
        return scores + self.bias(*scores.shape)


def doubled(arguments):
    return tuple(a.double() if isinstance(a, torch.Tensor) else a for a in arguments)


@pytest.mark.parametrize(("layer", "arguments", "kwargs"), [pytest.param(*c[1:], id=c[0]) for c in cases()])
class TestLayers:
    def test_copies(self, layer, arguments, kwargs):
        for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
            torch.testing.assert_close(other(*arguments, **kwargs), layer(*arguments, **kwargs), rtol=0, atol=0)

    def test_export(self, layer, arguments, kwargs):
        if isinstance(layer, RelativePositionBias):
            layer, arguments = Biased(layer), (torch.randn(3, 4),)
        program = torch.export.export(layer, arguments, kwargs)
        torch.testing.assert_close(program.module()(*arguments, **kwargs), layer(*arguments, **kwargs))

    def test_compile(self, layer, arguments, kwargs):
        torch._dynamo.reset()
        code = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(code(*arguments, **kwargs), layer(*arguments, **kwargs))

    def test_derivatives(self, layer, arguments, kwargs):
        layer, arguments = copy.deepcopy(layer).double(), doubled(arguments)
        if isinstance(layer, RelativePositionBias):
            function = lambda weight: functional_call(layer, {"weight": weight}, arguments).sin()  # noqa: E731
            inputs = (layer.weight.detach(),)
        else:
            function = lambda *t: tuple(r.sin() for r in as_tuple(layer(*t, **kwargs)))  # noqa: E731
            inputs = arguments
        leaves = tuple(t.detach().clone().requires_grad_() for t in inputs)
        assert gradcheck(function, leaves, fast_mode=True, check_forward_ad=True)
        assert gradgradcheck(function, leaves, fast_mode=True)
        directions = tuple(torch.randn_like(t) for t in inputs)
        step = 1e-6
        ahead, behind = (
            as_tuple(function(*(t + sign * step * d for t, d in zip(inputs, directions, strict=True))))
            for sign in (1, -1)
        )
        for tangent, a, b in zip(as_tuple(jvp(function, inputs, directions)[1]), ahead, behind, strict=True):
            torch.testing.assert_close(tangent, (a - b) / (2 * step), rtol=1e-6, atol=1e-8)

    def test_vmap(self, layer, arguments, kwargs):
        if isinstance(layer, RelativePositionBias):
            weights = torch.randn(3, *layer.weight.shape)
            mapped = vmap(lambda weight: functional_call(layer, {"weight": weight}, arguments))(weights)
            single = functional_call(layer, {"weight": weights[1]}, arguments)
        else:
            stacked = tuple(torch.stack((a, 2 * a, -a)) for a in arguments)
            mapped = vmap(lambda *t: layer(*t, **kwargs))(*stacked)
            single = layer(*(t[1] for t in stacked), **kwargs)
        for a, b in zip(as_tuple(mapped), as_tuple(single), strict=True):
            torch.testing.assert_close(a[1], b)


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def test_r1_penalty_through_position_layers_and_attention():
    torch.manual_seed(0)
    encoding, rotary = PositionalEncoding(4).double(), RotaryEmbedding(4)
    bias = RelativePositionBias(1, num_buckets=4, max_distance=3).double()
    nn.init.normal_(bias.weight)
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)

    def ours(x):
        heads = encoding(x).unsqueeze(1)
        query, key = rotary(heads, heads)
        return functional.scaled_dot_product_attention(query, key, heads, attn_mask=bias(5, 5))

    def plain(x):
        heads = (x + sinusoids(range(5), 4)).unsqueeze(1)
        rotated = rotation(heads, [range(5)] * 2, 4)
        index = torch.tensor([[t5_bucket(j - i, True, 4, 3) for j in range(5)] for i in range(5)])
        return (rotated @ rotated.mT / 2 + bias.weight[index].permute(2, 0, 1)).softmax(-1) @ heads

    grads = [
        torch.autograd.grad(r1_penalty(attend(x).tanh().sum((1, 2, 3)), x), bias.weight)[0] for attend in (ours, plain)
    ]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decode", [False, True])
def test_cache_positions_match_sequence_positions(decode):
    cache = KVCache(2, 1, 8, 4)
    cache.reset(padding=torch.tensor([0, 2]))
    tokens = torch.randn(2, 1, 4, 4)
    expected = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]])
    if decode:
        cache.update(tokens, tokens)
        tokens, expected = tokens[:, :, :1], torch.tensor([[4], [2]])
    rotary = RotaryEmbedding(4)
    rotated, _ = rotary(tokens, tokens, positions=cache.positions(tokens.size(2)))
    torch.testing.assert_close(rotated, rotation(tokens.double(), expected.tolist(), 4).float())


X, HEADS = torch.randn(2, 3, 4), torch.randn(2, 2, 3, 4)
ERRORS = [
    (lambda: PositionalEncoding(0), ValueError, "dim: expected a positive integer, got 0"),
    (lambda: PositionalEncoding(4, 0), ValueError, "max_len: expected a positive integer, got 0"),
    (lambda: PositionalEncoding(4, dropout=1.0), ValueError, r"dropout: expected a probability in \[0, 1\), got 1.0"),
    (lambda: PositionalEncoding(4, base=1.0), ValueError, "base: expected a finite number > 1, got 1.0"),
    (lambda: PositionalEncoding(5)(X), ValueError, r"x: expected \(B, N, dim\) with dim = 5, got \(2, 3, 4\)"),
    (lambda: PositionalEncoding(5, batch_first=False)(X), ValueError, r"x: expected \(N, B, dim\)"),
    (lambda: PositionalEncoding(4)(X.long()), TypeError, "x: expected a floating-point tensor, got torch.int64"),
    (lambda: PositionalEncoding(4, 2)(X), ValueError, "at most max_len = 2 positions, got 3 after offset 0"),
    (lambda: PositionalEncoding(4, 9)(X, 7), ValueError, "at most max_len = 9 positions, got 3 after offset 7; build"),
    (lambda: PositionalEncoding(4)(X, -1), ValueError, "offset: expected an integer >= 0, got -1"),
    (lambda: PositionalEncoding(4)(X, positions=X), TypeError, "positions: expected an integer tensor, got"),
    (
        lambda: PositionalEncoding(4)(X, positions=torch.zeros(3, 2, dtype=torch.long)),
        ValueError,
        r"positions: expected \(N,\) = \(3,\) or \(B, N\) = \(2, 3\), got \(3, 2\)",
    ),
    (lambda: RotaryEmbedding(5), ValueError, "dim: expected an even number, got 5"),
    (lambda: RotaryEmbedding(4, base=-1), ValueError, "base: expected a finite number > 1, got -1"),
    (lambda: RotaryEmbedding(4, scaling=0), ValueError, "scaling: expected a finite number > 0, got 0"),
    (lambda: RotaryEmbedding(6)(HEADS, HEADS), ValueError, r"query: expected \(B, H, N, D\) with D >= dim = 6"),
    (lambda: RotaryEmbedding(4)(X, HEADS), ValueError, r"query: expected \(B, H, N, D\)"),
    (lambda: RotaryEmbedding(4)(HEADS, HEADS[:, :, 1:]), ValueError, r"key: .* batch and length \(2, 3\)"),
    (lambda: RotaryEmbedding(4)(HEADS, HEADS, offset=-1), ValueError, "offset: expected an integer >= 0, got -1"),
    (lambda: RotaryEmbedding(4)(HEADS.long(), HEADS), TypeError, "query: expected a floating-point tensor"),
    (lambda: RotaryEmbedding(4)(HEADS, HEADS, positions=[1]), TypeError, "positions: expected a tensor, got list"),
    (lambda: RotaryEmbedding(4).tables(-1), ValueError, "length: expected an integer >= 0, got -1"),
    (lambda: RelativePositionBias(0), ValueError, "num_heads: expected a positive integer, got 0"),
    (lambda: RelativePositionBias(2, num_buckets=7), ValueError, "num_buckets: expected an even number >= 4"),
    (lambda: RelativePositionBias(2, num_buckets=1, bidirectional=False), ValueError, "num_buckets: .* >= 2, got 1"),
    (lambda: RelativePositionBias(2, max_distance=8), ValueError, "max_distance: expected more than 8, got 8"),
    (lambda: RelativePositionBias(2)(0, 3), ValueError, "query_length: expected a positive integer, got 0"),
    (lambda: RelativePositionBias(2)(3, 3, -2), ValueError, "offset: expected an integer >= 0, got -2"),
    (lambda: RelativePositionBias(2)(3, 3, torch.ones(2).long()), ValueError, r"offset: .* one element, got \(2,\)"),
    (lambda: RelativePositionBias(2)(3, 3, torch.ones(1)), TypeError, "offset: expected an integer tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), ERRORS)
def test_invalid_arguments_raise(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_state_dicts():
    layer, other = RelativePositionBias(2), RelativePositionBias(2)
    nn.init.normal_(layer.weight)
    assert [*layer.state_dict()] == ["weight"]
    of_t5 = {name.removeprefix("relative_attention_bias."): t for name, t in t5_state(layer.weight).items()}
    other.load_state_dict(of_t5)
    assert torch.equal(other(3, 4), layer(3, 4))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        RelativePositionBias(4).load_state_dict(layer.state_dict())


def t5_state(weight):
    return {"relative_attention_bias.weight": weight.detach()}
