"""Packed sequences and jagged nested tensors: values and every derivative are those of each sequence alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import jvp, vmap
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

import fastgen
from fastgen import random, reference
from fastgen.functional import scaled_dot_product_attention, varlen_attention
from fastgen.testing import assert_accurate

LENGTHS = {
    "mixed": ((3, 0, 1, 7), (3, 0, 1, 7)),
    "equal": ((4, 4, 4), (4, 4, 4)),
    "runs": ((2, 2, 5, 5, 0, 0, 2), (3, 3, 4, 4, 1, 1, 3)),
    "cross": ((3, 0, 5, 1), (4, 2, 0, 9)),
    "shuffled": ((2, 3, 2, 3, 2, 0, 3, 0), (1, 4, 1, 4, 1, 2, 4, 2)),
    "one": ((6,), (5,)),
    "empty": ((0, 0), (0, 0)),
}
WINDOWS = [(None, None), (None, 0), (2, 1), (0, None), (None, -2), (-1, 3), (3, -1), (-2, None), (1, -2)]


def positions(lengths, dtype=torch.int32):
    return torch.tensor((0, *lengths)).cumsum(0).to(dtype)


def problem(lengths, heads=(2, 2), dims=(4, 3), dtype=torch.float64):
    torch.manual_seed(sum(lengths[0]) * 100 + sum(lengths[1]))
    shapes = (
        (sum(lengths[0]), heads[0], dims[0]),
        (sum(lengths[1]), heads[1], dims[0]),
        (sum(lengths[1]), heads[1], dims[1]),
    )
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def keep_of(lengths, heads, p, seed=7):
    """(H, Tq, Tk): the row of a query among all, the column of a key in its sequence."""
    rows, groups = heads * sum(lengths[0]), random.groups_per_row(sum(lengths[1]))
    uniform = random.uniform_rows(torch.tensor([seed]), torch.arange(rows), rows, groups, 0, groups)
    return ((uniform[:, : sum(lengths[1])] >= p).double() / (1 - p)).reshape(heads, sum(lengths[0]), -1)


def formula(lengths, window=(None, None), keep=None):
    ends = [positions(own).tolist() for own in lengths]
    return lambda *tensors: reference.packed_attention(
        *tensors, *ends, None if keep is None else keep.to(tensors[0].dtype), *window
    )


def derivatives(function, tensors):
    """Values, gradients, gradients of a gradient's square, and tangents."""
    out, lse = function(*tensors)
    weight = torch.linspace(-1, 1, max(out.numel(), 1), dtype=torch.float64)[: out.numel()].view(out.shape)
    finite = lse.masked_fill(lse == -math.inf, 0)
    score = (out.double() * weight.to(out.device)).sum() + finite.double().square().sum()
    grads = torch.autograd.grad(score, tensors, create_graph=True)
    second = torch.autograd.grad(sum(g.double().square().sum() for g in grads), tensors)
    directions = tuple((t.detach() * 1.5).cos().to(t.dtype) for t in tensors)
    _, tangents = jvp(function, tuple(t.detach() for t in tensors), directions)
    return [out, lse, *grads, *second, *tangents]


def assert_same(ours, right, tensors):
    for mine, theirs in zip(derivatives(ours, tensors), derivatives(right, tensors), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.fixture
def seeded(monkeypatch):
    monkeypatch.setattr(torch, "randint", lambda *args, device=None, **kwargs: torch.tensor([7], device=device))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_values_and_every_derivative_are_those_of_each_sequence(lengths, window, backend):
    queries, keys = (positions(own, dtype) for own, dtype in zip(lengths, (torch.int32, torch.int64), strict=True))
    options = {"window": window, "enable_gqa": True, "return_lse": True}
    with fastgen.use_backend(backend):
        assert_same(
            lambda *t: varlen_attention(*t, queries, keys, **options),
            formula(lengths, window),
            problem(lengths, (4, 2)),
        )


@pytest.mark.parametrize("window", [(None, None), (2, 0), (None, -1), (-1, None)], ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS["mixed"], LENGTHS["shuffled"]], ids=["mixed", "shuffled"])
def test_dropout_of_packed_sequences(lengths, window, seeded):
    queries, keys = map(positions, lengths)
    assert_same(
        lambda *t: varlen_attention(*t, queries, keys, dropout_p=0.4, window=window, return_lse=True),
        formula(lengths, window, keep_of(lengths, 2, 0.4)),
        problem(lengths),
    )


def test_no_sequence_at_all():
    query, key, value = problem(((), ()))
    out, lse = varlen_attention(query, key, value, positions(()), return_lse=True)
    assert out.shape == (0, 2, 3)
    assert lse.shape == (2, 0)
    assert torch.autograd.grad(out.sum() + lse.sum(), key)[0].shape == key.shape


LONG = ((70, 0, 1, 17, 33), (33, 2, 0, 81, 40))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("window", [(None, None), (None, 0), (20, -3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dims", [(8, 24), (64, 64)], ids=str)
def test_error_is_at_most_twice_that_of_the_formula(attention_place, dims, dtype, window, dropout, seeded):
    """Values and gradients on every backend; second order where the heads are narrow."""
    tensors = problem(LONG, (2, 1), dims, dtype)
    queries, keys = (positions(own).to(attention_place) for own in LONG)
    keep = keep_of(LONG, 2, dropout) if dropout else None
    options = {"window": window, "enable_gqa": True, "return_lse": True, "dropout_p": dropout}

    def results(function, tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        if dims[0] < 64:
            return derivatives(function, tensors)
        return derivatives_of_first_order(function, tensors)

    ours = results(lambda *t: varlen_attention(*t, queries, keys, **options), [t.to(attention_place) for t in tensors])
    right = formula(LONG, window, keep)
    plain, exact = results(right, tensors), results(right, [t.double() for t in tensors])
    for i, (mine, theirs, true) in enumerate(zip(ours, plain, exact, strict=True)):
        size = float(true.detach()[true.isfinite()].abs().max())
        # Gradients are differences of large terms.
        assert_accurate(mine.cpu(), theirs, true, f"result {i}", 0 if i < 2 else 4 * torch.finfo(dtype).eps * size)


def derivatives_of_first_order(function, tensors):
    out, lse = function(*tensors)
    finite = lse.masked_fill(lse == -math.inf, 0)
    score = out.double().sin().sum() + finite.double().square().sum()
    return [out, lse, *torch.autograd.grad(score, tensors)]


def test_a_sequence_does_not_depend_on_its_place(attention_place):
    """The same sequence at many places, bit for bit, and whatever its neighbors hold."""
    torch.manual_seed(0)
    one = torch.randn(37, 2, 16)
    lengths = (37, 5, 37, 128, 37)
    packed = [torch.full((own, 2, 16), math.nan) if own != 37 else one for own in lengths]
    tokens = torch.cat(packed).to(attention_place)
    out = varlen_attention(tokens, tokens, tokens, positions(lengths).to(attention_place), is_causal=True).cpu()
    parts = out.split(lengths)
    alone = varlen_attention(*[one.to(attention_place)] * 3, positions([37]).to(attention_place), is_causal=True).cpu()
    for i in (0, 2, 4):
        assert torch.equal(parts[i], alone)


def test_packed_equals_padded_with_a_mask():
    lengths = (5, 2, 7)
    query, key, value = problem((lengths, lengths))
    out = varlen_attention(query, key, value, positions(lengths))
    padded = [
        torch.stack([pad(part, (0, 0, 0, 0, 0, 7 - part.size(0))) for part in t.split(lengths)]).transpose(1, 2)
        for t in (query, key, value)
    ]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None, None, None]
    expected = scaled_dot_product_attention(*padded, mask).transpose(1, 2)
    for i, part in enumerate(out.split(lengths)):
        torch.testing.assert_close(part, expected[i, : lengths[i]])


def test_softcap():
    lengths = ((3, 0, 5), (4, 2, 5))
    ends, tensors = [positions(own) for own in lengths], problem(lengths)

    def ours(*t):
        return varlen_attention(*t, *ends, is_causal=True, softcap=0.7, return_lse=True)

    def right(*t):
        return reference.packed_attention(*t, *(e.tolist() for e in ends), window_right=0, softcap=0.7)

    assert_same(ours, right, tensors)


def test_sinks_scale_and_strided_inputs():
    lengths = LENGTHS["cross"]
    queries, keys = map(positions, lengths)
    qkv = torch.randn(9, 3, 4, 6, dtype=torch.float64)  # (tokens, q k v, heads, dim)
    query = qkv[:, 0]
    key, value = torch.randn(15, 4, 12, dtype=torch.float64).chunk(2, -1)
    sinks = torch.randn(4, dtype=torch.float64)
    out, lse = varlen_attention(query, key, value, queries, keys, sinks=sinks, scale=0.7, return_lse=True)
    assert out.is_contiguous()
    start, begin = 0, 0
    for n, m in zip(*lengths, strict=True):
        tensors = query[start : start + n], key[begin : begin + m], value[begin : begin + m]
        expected, of_lse = scaled_dot_product_attention(
            *(t.transpose(0, 1)[None] for t in tensors), sinks=sinks, scale=0.7, return_lse=True
        )
        torch.testing.assert_close(out[start : start + n], expected[0].transpose(0, 1))
        torch.testing.assert_close(lse[:, start : start + n], of_lse[0])
        start, begin = start + n, begin + m


def test_heads_of_one_channel_of_any_strides():
    """Padded to the values' width they must not become channels last, which PyTorch's kernel reads as rows."""
    query = torch.empty_strided((1, 2, 1), (4, 1, 38), dtype=torch.bfloat16).normal_()
    key = torch.empty_strided((33, 2, 1), (11, 1, 30), dtype=torch.bfloat16).normal_()
    value = torch.randn(33, 2, 32).bfloat16()
    ends = positions((1,)), positions((33,))
    out = varlen_attention(query, key, value, *ends)
    exact = reference.packed_attention(query.double(), key.double(), value.double(), *(e.tolist() for e in ends))[0]
    torch.testing.assert_close(out.double(), exact, rtol=0.03, atol=0.03)


def test_transforms_compile_autocast_and_checkpoints():
    lengths = LENGTHS["mixed"]
    query, key, value = problem(lengths)
    ends = positions(lengths[0])
    expected = varlen_attention(query, key, value, ends, is_causal=True)

    def call(*tensors):
        return varlen_attention(*tensors, is_causal=True)

    for backend in ("eager", "aot_eager"):
        compiled = torch.compile(call, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(query, key, value, ends), expected)
        other = positions((5, 6))  # no recompilation: the positions are data
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled(query, key, value, positions((1, 2, 2, 6)))
        torch.testing.assert_close(compiled(query, key, value, other), call(query, key, value, other))
    stacked = torch.stack([query, 2 * query])
    mapped = vmap(call, in_dims=(0, None, None, None))(stacked, key, value, ends)
    torch.testing.assert_close(mapped[1], call(2 * query, key, value, ends))
    both = torch.stack([ends, positions((5, 1, 1, 4))])
    mapped = vmap(call, in_dims=(None, None, None, 0))(query, key, value, both)
    torch.testing.assert_close(mapped[1], call(query, key, value, both[1]))
    seeds = vmap(lambda q: varlen_attention(q, key, value, ends, dropout_p=0.5), randomness="different")(
        torch.stack([query, query])
    )
    assert not torch.equal(seeds[0], seeds[1])
    with torch.autocast("cpu", torch.bfloat16):
        low = varlen_attention(query.float(), key.float(), value.float(), ends, is_causal=True)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), expected, rtol=0.03, atol=0.03)

    def dropped(*tensors):
        return varlen_attention(*tensors, ends, dropout_p=0.5, generator=torch.Generator().manual_seed(1))

    again = checkpoint(dropped, query, key, value, use_reentrant=False)
    torch.testing.assert_close(
        torch.autograd.grad(again.sum(), query)[0], torch.autograd.grad(dropped(query, key, value).sum(), query)[0]
    )


def test_positions_that_changed_before_the_backward_pass_raise():
    query, key, value = problem(LENGTHS["mixed"])
    ends = positions(LENGTHS["mixed"][0])
    out = varlen_attention(query, key, value, ends)
    ends[1] = 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_third_derivatives_raise():
    query, key, value = problem(LENGTHS["mixed"])
    out = varlen_attention(query, key, value, positions(LENGTHS["mixed"][0]))
    (first,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="third"):
        second.sum().backward()


TOKENS = torch.zeros(6, 2, 4)
GOOD = torch.tensor([0, 2, 6])
BAD = {
    "begin": (lambda: varlen_attention(*[TOKENS] * 3, GOOD + 1), ValueError, "cu_seqlens_q: .*0 to 6, got 1 to 7"),
    "end": (
        lambda: varlen_attention(*[TOKENS] * 3, GOOD, torch.tensor([0, 2, 5])),
        ValueError,
        "cu_seqlens_k: expected positions from 0 to 6, got 0 to 5",
    ),
    "order": (
        lambda: varlen_attention(*[TOKENS] * 3, torch.tensor([0, 5, 3, 6])),
        ValueError,
        "cu_seqlens_q: expected positions that do not decrease, got 5 before 3",
    ),
    "order with dropout": (
        lambda: varlen_attention(*[TOKENS] * 3, torch.tensor([0, 5, 3, 6]), dropout_p=0.5),
        ValueError,
        "cu_seqlens_q: expected positions that do not decrease, got 5 before 3",
    ),
    "dtype": (
        lambda: varlen_attention(*[TOKENS] * 3, GOOD.float()),
        TypeError,
        "cu_seqlens_q: expected int32 or int64",
    ),
    "shape": (lambda: varlen_attention(*[TOKENS] * 3, GOOD[None]), ValueError, r"cu_seqlens_q: expected \(sequences"),
    "no position": (lambda: varlen_attention(*[TOKENS] * 3, GOOD[:0]), ValueError, r"cu_seqlens_q: .*got \(0,\)"),
    "count": (
        lambda: varlen_attention(*[TOKENS] * 3, GOOD, torch.tensor([0, 6])),
        ValueError,
        "cu_seqlens_k: expected as many sequences as in cu_seqlens_q, 2, got 1",
    ),
    "device": (lambda: varlen_attention(*[TOKENS] * 3, GOOD.to("meta")), ValueError, "cu_seqlens_q: .*device"),
    "a list": (lambda: varlen_attention(*[TOKENS] * 3, [0, 6]), TypeError, "cu_seqlens_q: expected a tensor, got list"),
    "dims": (
        lambda: varlen_attention(TOKENS[None], TOKENS, TOKENS, GOOD),
        ValueError,
        r"query: expected \(tokens, heads",
    ),
    "heads": (lambda: varlen_attention(TOKENS, TOKENS[:, :1], TOKENS[:, :1], GOOD, enable_gqa=False), None, None),
    "grouped heads": (
        lambda: varlen_attention(torch.zeros(6, 4, 4), TOKENS, TOKENS, GOOD),
        ValueError,
        "key: .*grouped heads need enable_gqa",
    ),
    "value": (lambda: varlen_attention(TOKENS, TOKENS, TOKENS[:4], GOOD), ValueError, "value: expected key's length 6"),
    "longest": (
        lambda: varlen_attention(*[TOKENS] * 3, GOOD, None, 2.5),
        TypeError,
        "max_seqlen_q: expected an integer",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_by_name(name):
    call, kind, text = BAD[name]
    if kind is None:  # one head of keys broadcasts, as in scaled_dot_product_attention
        call()
        return
    with pytest.raises(kind, match=text):
        call()


def test_operators_refuse_bad_sequences():
    tokens = torch.zeros(1, 2, 6, 4)
    forward, options = torch.ops.fastgen.attention_forward, (0.0, -1, -1, 0.5, 0.0, False)
    for sequences, batch, text in [
        (torch.tensor([[0, 6]] * 2), 1, "sequences: expected torch.int32"),
        (torch.tensor([0, 6], dtype=torch.int32), 1, r"sequences: expected \(2, sequences \+ 1\)"),
        (torch.tensor([[0, 6]] * 2, dtype=torch.int32), 2, "query: expected a batch of 1"),
    ]:
        with pytest.raises((TypeError, ValueError), match=text):
            forward(*[tokens.expand(batch, -1, -1, -1)] * 3, None, None, sequences, *options)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    sequences = torch.tensor([[0, 6]] * 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="mask: expected None beside sequences"):
        forward(*[tokens] * 3, mask, None, sequences, *options)
    with pytest.raises(ValueError, match="window_left: expected >= 0"):
        forward(*[tokens] * 3, None, None, None, 0.0, -2, *options[2:])


# --------------------------------------------------------------------------------------------------
# Nested tensors


def nested(lengths, heads=2, dim=4, offsets=None):
    values = torch.randn(sum(lengths), heads * dim, dtype=torch.float64)
    offsets = positions(lengths, torch.int64) if offsets is None else offsets
    return torch.nested.nested_tensor_from_jagged(values, offsets).requires_grad_()


def heads_of(tensor, heads=2):
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def test_jagged_tensors_give_the_values_and_gradients_of_torch():
    query = nested((3, 5, 2))
    key, value = nested((3, 5, 2), offsets=query.offsets()), nested((3, 5, 2), offsets=query.offsets())
    ours, torchs = (
        function(heads_of(query), heads_of(key), heads_of(value))
        for function in (scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention)
    )
    assert ours.layout == torch.jagged
    assert ours.offsets() is query.offsets()
    assert ours.shape == torchs.shape
    torch.testing.assert_close(ours.values(), torchs.values())
    results = [torch.autograd.grad(out.values().square().sum(), (query, key, value)) for out in (ours, torchs)]
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine.values(), theirs.values())
    joined = ours.transpose(1, 2).flatten(2)  # as in a layer
    assert joined.offsets() is query.offsets()


def test_jagged_tensors_of_other_lengths_take_every_option():
    lengths = (3, 0, 4), (2, 5, 4)
    query, key = nested(lengths[0], 4), nested(lengths[1], 2)
    value = nested(lengths[1], 2, 3, key.offsets())
    options = {"is_causal": True, "enable_gqa": True, "scale": 0.4, "sinks": torch.randn(4), "return_lse": True}
    out, lse = scaled_dot_product_attention(heads_of(query, 4), heads_of(key), heads_of(value), **options)
    assert out.shape[:2] == lse.shape[:2] == (3, 4)
    tensors = [t.values().unflatten(1, (heads, -1)) for t, heads in ((query, 4), (key, 2), (value, 2))]
    expected, of_lse = varlen_attention(*tensors, query.offsets(), key.offsets(), **options)
    torch.testing.assert_close(out.values().transpose(0, 1), expected)
    torch.testing.assert_close(lse.values(), of_lse)


def test_jagged_tensors_compile():
    query = nested((3, 5, 2))
    compiled = torch.compile(
        lambda x: scaled_dot_product_attention(heads_of(x), heads_of(x), heads_of(x), is_causal=True),
        fullgraph=True,
        backend="aot_eager",
    )
    expected = scaled_dot_product_attention(heads_of(query), heads_of(query), heads_of(query), is_causal=True)
    torch.testing.assert_close(compiled(query).values(), expected.values())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_that_do_not_fit_are_refused_by_name():
    x, y = heads_of(nested((3, 2))), heads_of(nested((3, 2)))
    dense = torch.zeros(2, 2, 3, 4, dtype=torch.float64)
    strided = torch.nested.nested_tensor([torch.zeros(2, 3, 4), torch.zeros(2, 2, 4)])
    holes = torch.nested.nested_tensor_from_jagged(
        torch.zeros(5, 8), torch.tensor([0, 3, 5]), lengths=torch.tensor([2, 1])
    )
    for tensors, mask, kind, text in [
        ((x, x, x), torch.ones(3, 3) > 0, ValueError, "attn_mask: expected None beside nested tensors"),
        ((x, y, x), None, ValueError, "value: expected key's jagged length"),
        ((x, dense, dense), None, TypeError, "key: expected a jagged nested tensor, .*got a dense one"),
        ((dense, x, x), None, TypeError, "key: expected .*(N|n)ested"),
        ((strided,) * 3, None, TypeError, "query: expected a jagged nested tensor, .*another layout"),
        ((nested((3, 2)),) * 3, None, ValueError, r"query: expected \(batch, heads, jagged length, head_dim\)"),
        ((x.transpose(1, 2),) * 3, None, ValueError, r"query: expected \(batch, heads, jagged length, head_dim\)"),
        ((heads_of(holes),) * 3, None, ValueError, "query: expected sequences without holes"),
    ]:
        with pytest.raises(kind, match=text):
            scaled_dot_product_attention(*tensors, mask)
