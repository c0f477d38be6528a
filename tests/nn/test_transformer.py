"""MultiheadAttention and Transformer layers against torch: values, derivatives, state dicts, errors."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen import functional
from fastgen import nn as ours
from fastgen.losses import r1_penalty
from fastgen.nn._norm import apply_norm
from fastgen.testing import assert_accurate

B, L, S, E, H = 3, 5, 4, 8, 2
NAMES = (
    "MultiheadAttention",
    "TransformerEncoderLayer",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerDecoder",
    "Transformer",
)


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def padding_of(batch, keys, kind="bool"):
    """Left-aligned padding mask of random lengths of at least 1."""
    if kind == "float":
        return normal(batch, keys)
    return torch.arange(keys) >= torch.randint(1, keys + 1, (batch, 1))


def mask_of(kind, queries, keys, entries=None):
    """Attention mask "bool", "float", "causal" or "bool causal"; no query is fully masked."""
    shape = (queries, keys) if entries is None else (entries, queries, keys)
    if kind == "float":
        return normal(*shape)
    masked = torch.ones(shape, dtype=torch.bool).triu(1) if "causal" in kind else torch.rand(shape) > 0.6
    masked[..., 0] = False
    return masked if "bool" in kind else torch.zeros(shape, dtype=torch.float64).masked_fill(masked, -torch.inf)


def build(module, name, dtype=torch.float64, seed=0, **kwargs):
    torch.manual_seed(seed)
    kwargs = {"dropout": 0.0, **kwargs}
    if name == "MultiheadAttention":
        return module.MultiheadAttention(E, H, **kwargs).to(dtype)
    if name == "Transformer":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about enable_nested_tensor
            return module.Transformer(E, H, 1, 2, 12, **kwargs).to(dtype)
    layer = getattr(module, name.removesuffix("Layer") + "Layer")(E, H, 12, **kwargs).to(dtype)
    if name.endswith("Layer"):
        return layer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(module, name)(layer, 2, nn.LayerNorm(E).to(dtype))


def pair(name, **kwargs):
    """fastgen's and torch's layer with the same random parameters."""
    mine, theirs = build(ours, name, **kwargs), build(nn, name, **kwargs)
    for parameter in mine.parameters():
        nn.init.normal_(parameter, std=0.5)
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


def inputs(name, batch_first=True, dtype=torch.float64):
    """Input tensors of a layer, with two different lengths."""
    count = {"MultiheadAttention": 3, "TransformerEncoderLayer": 1, "TransformerEncoder": 1}.get(name, 2)
    tensors = [normal(B, n, E, dtype=dtype) for n in (L, S, S)[:count]]
    return tensors if batch_first else [t.transpose(0, 1).contiguous() for t in tensors]


def first(result):
    return result[0] if isinstance(result, tuple) else result


def call(module, tensors, kwargs):
    if isinstance(module, nn.MultiheadAttention):
        kwargs = {"need_weights": False, **kwargs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about masks of different dtypes
        return module(*tensors, **kwargs)


def assert_same(mine, theirs, tensors, kwargs=None):
    """Compares outputs, weights, and gradients of inputs, parameters and floating masks."""
    kwargs = kwargs or {}
    kwargs = {
        name: value.detach().clone().requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and bool(value.isfinite().all())
        else value
        for name, value in kwargs.items()
    }
    results, grads = [], []
    for module in (mine, theirs):
        leaves = {id(t): t.detach().clone().requires_grad_() for t in tensors}
        result = call(module, [leaves[id(t)] for t in tensors], kwargs)
        result = result if isinstance(result, tuple) else (result,)
        results.append(result)
        wanted = [*leaves.values(), *module.parameters()]
        wanted += [value for value in kwargs.values() if isinstance(value, torch.Tensor) and value.requires_grad]
        loss = sum((r.sin() * torch.arange(r.numel()).reshape(r.shape)).sum() for r in result if r is not None)
        grads.append(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------------------------
# Values and first derivatives


ATTENTION = [
    # constructor, same tensors, unbatched, attn_mask (rank), key_padding_mask, forward
    ({}, "q k v", False, None, None, {}),
    ({}, "qkv", False, None, None, {}),
    ({"batch_first": True}, "qkv", False, None, None, {}),
    ({"batch_first": True}, "q kv", False, "bool 2", None, {}),
    ({"batch_first": True}, "q kv", False, None, "bool", {}),
    ({}, "q kv", False, None, "float", {}),
    ({}, "qkv", False, "causal 2", None, {"is_causal": True}),
    ({"batch_first": True}, "qkv", False, "bool causal 2", None, {"is_causal": True}),
    ({"batch_first": True}, "qkv", False, "bool causal 2", "bool", {"is_causal": True}),
    ({"batch_first": True}, "q kv", False, "causal 2", None, {"is_causal": True}),
    ({}, "qkv", False, "causal 2", None, {"is_causal": True, "need_weights": True}),
    ({}, "q kv", False, "float 3", None, {}),
    ({"batch_first": True}, "q k v", False, "bool 3", "bool", {}),
    ({"batch_first": True}, "q k v", False, "float 2", "bool", {}),
    ({"batch_first": True}, "q k v", False, "bool 2", "float", {}),
    ({}, "qkv", True, "float 2", None, {}),
    ({"batch_first": True}, "q kv", True, "bool 3", "bool", {}),
    ({"batch_first": True}, "q k v", True, None, "float", {"need_weights": True}),
    ({}, "qkv", True, None, None, {"need_weights": True, "average_attn_weights": False}),
    ({"bias": False}, "q kv", False, "bool 2", "bool", {"need_weights": True}),
    ({"bias": False, "batch_first": True}, "qkv", False, None, None, {}),
    ({"kdim": 6, "vdim": 10}, "q k v", False, "float 2", None, {}),
    ({"kdim": 6, "vdim": 10, "bias": False, "batch_first": True}, "q k v", False, None, "bool", {"need_weights": True}),
    ({"kdim": 6}, "q k v", True, None, None, {}),
    ({"vdim": 6, "batch_first": True}, "q k v", False, None, None, {}),
    ({"add_bias_kv": True}, "qkv", False, None, None, {}),
    ({"add_bias_kv": True, "batch_first": True}, "q kv", False, "bool 2", "bool", {}),
    ({"add_zero_attn": True}, "q k v", False, "float 3", None, {"need_weights": True, "average_attn_weights": False}),
    ({"add_zero_attn": True, "add_bias_kv": True, "bias": False}, "q k v", True, "bool 2", None, {}),
    ({"add_zero_attn": True, "add_bias_kv": True, "kdim": 3}, "q k v", False, "float 3", "float", {}),
]


def attention_case(constructor, same, unbatched, mask, padding):
    first_dim = constructor.get("batch_first", False)
    widths = (E, constructor.get("kdim", E), constructor.get("vdim", E))
    query, key, value = (normal(B, n, w) for n, w in zip((L, S, S), widths, strict=True))
    tensors = {"qkv": [query] * 3, "q kv": [query, key, key], "q k v": [query, key, value]}[same]
    batch, keys, kwargs = 1 if unbatched else B, tensors[1].size(1), {}
    if mask is not None:
        kind, rank = mask.rsplit(" ", 1)
        kwargs["attn_mask"] = mask_of(kind, L, keys, batch * H if rank == "3" else None)
    if padding is not None:
        kwargs["key_padding_mask"] = padding_of(batch, keys, padding)
    if unbatched:
        kwargs |= {"key_padding_mask": kwargs["key_padding_mask"][0]} if padding else {}
        made = {id(t): t[0] for t in tensors}
    else:
        made = {id(t): t if first_dim else t.transpose(0, 1).contiguous() for t in tensors}
    return [made[id(t)] for t in tensors], kwargs


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: " ".join(map(str, case)))
def test_attention_matches_torch(case):
    constructor, same, unbatched, mask, padding, kwargs = case
    mine, theirs = pair("MultiheadAttention", **constructor)
    tensors, masks = attention_case(constructor, same, unbatched, mask, padding)
    assert_same(mine, theirs, tensors, kwargs | masks)


ENCODER_LAYERS = [
    # constructor, masks, forward
    ({}, (None, None), {}),
    ({"batch_first": True}, ("causal", None), {"is_causal": True}),
    ({"norm_first": True}, ("float", None), {}),
    ({"norm_first": True, "batch_first": True}, (None, "bool"), {}),
    ({"activation": "gelu", "bias": False}, ("bool", "bool"), {}),
    ({"activation": torch.tanh, "layer_norm_eps": 0.1}, ("bool causal", "bool"), {"is_causal": True}),
    ({"activation": nn.GELU(), "norm_first": True}, (None, "float"), {}),
]


@pytest.mark.parametrize("unbatched", [False, True], ids=["batched", "unbatched"])
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerEncoder"])
@pytest.mark.parametrize("case", ENCODER_LAYERS, ids=str)
def test_encoders_match_torch(name, case, unbatched):
    constructor, (mask, padding), kwargs = case
    mine, theirs = pair(name, **constructor)
    x = inputs(name, constructor.get("batch_first", False))[0]
    kwargs = dict(kwargs)
    if mask is not None:
        kwargs["src_mask" if name.endswith("Layer") else "mask"] = mask_of(mask, L, L)
    if padding is not None:
        kwargs["src_key_padding_mask"] = padding_of(B, L, padding)
    if unbatched:
        x = x[0] if constructor.get("batch_first") else x[:, 0]
        kwargs |= {"src_key_padding_mask": kwargs["src_key_padding_mask"][0]} if padding else {}
    for module in (mine, theirs):
        module.train(mask is None)
    assert_same(mine, theirs, [x], kwargs)


@pytest.mark.parametrize("name", ["TransformerDecoderLayer", "TransformerDecoder", "Transformer"])
@pytest.mark.parametrize("case", range(5))
def test_decoders_match_torch(name, case):
    constructor = (
        {},
        {"batch_first": True, "norm_first": True},
        {"bias": False, "activation": "gelu"},
        {"norm_first": True, "activation": torch.tanh},
        {"batch_first": True},
    )[case]
    tgt, memory = inputs(name, constructor.get("batch_first", False))
    kwargs = (
        {},
        {"tgt_mask": mask_of("causal", L, L), "tgt_is_causal": True, "memory_key_padding_mask": padding_of(B, S)},
        {"tgt_mask": mask_of("bool", L, L, B * H), "memory_mask": mask_of("bool", L, S)},
        {"tgt_key_padding_mask": padding_of(B, L, "float"), "memory_mask": mask_of("float", L, S)},
        {"tgt_mask": mask_of("bool causal", L, L), "tgt_key_padding_mask": padding_of(B, L)},
    )[case]
    mine, theirs = pair(name, **constructor)
    tensors = [memory, tgt] if name == "Transformer" else [tgt, memory]
    if name == "Transformer" and case == 1:
        kwargs["src_key_padding_mask"] = kwargs["memory_key_padding_mask"]
    assert_same(mine, theirs, tensors, kwargs)
    if case == 0:
        tensors = [t[:, 0] for t in tensors]
        assert_same(mine, theirs, tensors)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", [(), ("mask",), ("padding",), ("mask", "padding")], ids=str)
@pytest.mark.parametrize("name", NAMES[:2] + NAMES[3:4])
def test_inference_matches_torch(name, masks, batch_first):
    """torch uses fused inference kernels and nested tensors here; padded positions are 0."""
    mine, theirs = (module.eval() for module in pair(name, batch_first=batch_first))
    x, kwargs = inputs(name, batch_first)[0], {}
    name_of = {"MultiheadAttention": "attn_mask", "TransformerEncoder": "mask"}.get(name, "src_mask")
    if "mask" in masks:
        kwargs[name_of] = mask_of("bool", L, L)
    if "padding" in masks:
        kwargs["key_padding_mask" if name == "MultiheadAttention" else "src_key_padding_mask"] = padding_of(B, L)
    tensors = [x] * (3 if name == "MultiheadAttention" else 1)
    with torch.no_grad():
        result, expected = call(mine, tensors, kwargs), call(theirs, tensors, kwargs)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    if name == "TransformerEncoder" and masks == ("padding",) and batch_first:
        padding = kwargs["src_key_padding_mask"]
        assert bool(padding.any())
        assert torch.equal(result[padding], mine.norm(torch.zeros(int(padding.sum()), E, dtype=x.dtype)))
        with_grad = call(mine, tensors, kwargs)
        torch.testing.assert_close(with_grad, call(theirs, tensors, kwargs), rtol=1e-10, atol=1e-10)
        assert not torch.allclose(with_grad[padding], result[padding])


@pytest.mark.parametrize("name", NAMES)
def test_sequence_first_outputs_are_contiguous(name):
    """As in torch, so that callers may use view."""
    mine = build(ours, name)
    assert first(call(mine, inputs(name, False), {})).is_contiguous()


def test_masks_are_not_expanded(monkeypatch):
    calls = []

    def record(query, key, value, attn_mask=None, *rest, **kwargs):
        calls.append((None if attn_mask is None else tuple(attn_mask.shape), kwargs["is_causal"]))
        return original(query, key, value, attn_mask, *rest, **kwargs)

    original = functional.scaled_dot_product_attention
    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    mine, x = build(ours, "MultiheadAttention", batch_first=True), normal(B, L, E)
    causal = mask_of("causal", L, L)
    for kwargs in (
        {},
        {"key_padding_mask": padding_of(B, L)},
        {"attn_mask": causal},
        {"attn_mask": causal, "is_causal": True},
        {"attn_mask": causal, "key_padding_mask": padding_of(B, L)},
    ):
        mine(x, x, x, need_weights=False, **kwargs)
    expected = [(None, False), ((B, 1, 1, L), False), ((1, 1, L, L), False), (None, True), ((B, 1, L, L), False)]
    assert calls == expected


@pytest.mark.parametrize("kind", ["causal", "bool causal"])
def test_causal_masks_are_detected(kind, monkeypatch):
    hints = []
    original = functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: hints.append(kwargs["is_causal"]) or original(*args, **kwargs),
    )
    encoder, decoder = build(ours, "TransformerEncoder"), build(ours, "TransformerDecoder")
    x, mask = normal(L, B, E), mask_of(kind, L, L)
    encoder(x, mask)
    decoder(x, x, mask)
    assert hints == [True, True] + [True, False] * 2
    hints.clear()
    encoder(x, mask, is_causal=False)
    encoder(x, ~mask if kind == "bool causal" else -mask.nan_to_num(neginf=-1.0))
    assert hints == [False] * 4


def test_learned_masks_are_never_treated_as_causal():
    encoder, x = build(ours, "TransformerEncoder"), normal(L, B, E)
    mask = mask_of("causal", L, L).requires_grad_()
    (grad,) = torch.autograd.grad(encoder(x, mask).sin().sum(), mask)
    assert bool(grad.any())


def test_extra_keys_are_not_masked_by_a_causal_mask():
    """Without weights, torch masks the extra keys for all queries if is_causal is set; with weights it does not."""
    mine, theirs = pair("MultiheadAttention", add_bias_kv=True, add_zero_attn=True)
    x, mask = normal(L, B, E), mask_of("causal", L, L)
    expected = theirs(x, x, x, attn_mask=mask, need_weights=False)[0]
    for need_weights in (True, False):
        result = mine(x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights)[0]
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["padding", "float padding", "mask", "float mask", "both"])
def test_fully_masked_queries_have_zero_attention_and_finite_gradients(kind, need_weights):
    mine = pair("MultiheadAttention", batch_first=True)[0]
    x = normal(B, L, E).requires_grad_()
    padding, mask = torch.zeros(B, L, dtype=torch.bool), torch.zeros(L, L, dtype=torch.bool)
    padding[1], mask[2] = True, True
    masks = {"attn_mask": mask} if "mask" in kind else {"key_padding_mask": padding}
    masks = {"attn_mask": mask, "key_padding_mask": padding} if kind == "both" else masks
    if "float" in kind:
        masks = {name: torch.zeros(m.shape).double().masked_fill(m, -torch.inf) for name, m in masks.items()}
    out, weights = mine(x, x, x, need_weights=need_weights, **masks)
    empty = (padding[:, :, None] if "padding" in kind or kind == "both" else torch.zeros(B, L, 1, dtype=torch.bool)) | (
        mask[:, :1] if "mask" in kind or kind == "both" else torch.zeros(L, 1, dtype=torch.bool)
    )
    empty = empty[..., 0]
    torch.testing.assert_close(out[empty], mine.out_proj.bias.expand(int(empty.sum()), E))
    assert bool(out.isfinite().all())
    if need_weights:
        assert not bool(weights[empty].any())
        torch.testing.assert_close(weights[~empty].sum(-1), torch.ones(int((~empty).sum()), dtype=torch.float64))
    grads = torch.autograd.grad(out.sin().sum(), [x, *mine.parameters()], create_graph=True)
    again = torch.autograd.grad(sum(g.square().sum() for g in grads), [x, *mine.parameters()])
    for grad in (*grads, *again):
        assert bool(grad.isfinite().all())
    decoder = build(ours, "TransformerDecoderLayer", batch_first=True)
    assert bool(decoder(x, x, memory_key_padding_mask=padding, tgt_key_padding_mask=padding).isfinite().all())


# --------------------------------------------------------------------------------------------------
# Low precision and autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
def test_low_precision_accuracy(dtype, need_weights):
    torch.manual_seed(1)
    exact = nn.MultiheadAttention(64, 4, batch_first=True).to(dtype).double()
    mine, theirs = ours.MultiheadAttention(64, 4, batch_first=True), nn.MultiheadAttention(64, 4, batch_first=True)
    x = torch.randn(4, 48, 64).to(dtype)
    padding, upstream = padding_of(4, 48), torch.randn(4, 48, 64).to(dtype)
    results = []
    for module, kind in ((mine, dtype), (theirs, dtype), (exact, torch.float64)):
        module.to(kind).load_state_dict(exact.state_dict())
        leaf = x.to(kind).requires_grad_()
        out = module(leaf, leaf, leaf, key_padding_mask=padding, need_weights=need_weights)[0]
        results.append([out, *torch.autograd.grad(out, [leaf, *module.parameters()], upstream.to(kind))])
    for index, (a, b, c) in enumerate(zip(*results, strict=True)):
        assert a.dtype == dtype
        assert_accurate(a, b, c, f"result {index}")


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", NAMES[1:3])
def test_autocast_keeps_the_residual_stream_in_float32(name, norm_first):
    mine, theirs = pair(name, dtype=torch.float32, norm_first=norm_first)
    exact = build(nn, name, norm_first=norm_first)
    exact.load_state_dict(mine.state_dict())
    tensors = inputs(name, dtype=torch.float32)
    tensors = [t.transpose(0, 1).contiguous() for t in tensors]
    results = []
    for module, kind, low in (
        (mine, torch.float32, True),
        (theirs, torch.float32, True),
        (exact, torch.float64, False),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out = module(*[t.to(kind) for t in tensors])
        results.append([out, *torch.autograd.grad(out.sin().sum(), module.parameters())])
    for index, (a, b, c) in enumerate(zip(*results, strict=True)):
        assert a.dtype == b.dtype == torch.float32
        assert_accurate(a, b, c, f"result {index}", allowance=0.02 * float(c.detach().abs().max()))


@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast_dtypes_match_torch(need_weights):
    mine, theirs = pair("MultiheadAttention", dtype=torch.float32)
    x = normal(L, B, E, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = (m(x, x, x, need_weights=need_weights) for m in (mine, theirs))
    for a, b in zip(result, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


# --------------------------------------------------------------------------------------------------
# Second-order derivatives, forward mode, transforms


def scores_of(module, tensors, **kwargs):
    out = first(call(module, tensors, kwargs))
    return out.sin().transpose(0, 1 if module_batch_dim(module) else 0).flatten(1).sum(1)


def module_batch_dim(module):
    found = next(m for m in module.modules() if isinstance(m, nn.MultiheadAttention))
    return 0 if found.batch_first else 1


def penalty_grads(module, tensors, **kwargs):
    leaves = {id(t): t.detach().clone().requires_grad_() for t in tensors}
    tensors = [leaves[id(t)] for t in tensors]
    scores = scores_of(module, tensors, **kwargs)
    samples = tensors[0].transpose(0, 1) if module_batch_dim(module) else tensors[0]
    if samples is not tensors[0]:
        (gradient,) = torch.autograd.grad(scores.sum(), tensors[0], create_graph=True)
        penalty = gradient.square().sum() / (2 * B)
    else:
        penalty = r1_penalty(scores, samples)
    return torch.autograd.grad(penalty, module.parameters(), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_r1_penalty_matches_unfused_torch(name, batch_first):
    mine, theirs = pair(name, batch_first=batch_first, **({} if name == NAMES[0] else {"activation": "gelu"}))
    tensors = inputs(name, batch_first)
    result = penalty_grads(mine, tensors)
    with sdpa_kernel(SDPBackend.MATH):
        expected = penalty_grads(theirs, tensors)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_r1_penalty_requires_our_class():
    layer, x = nn.MultiheadAttention(E, H, batch_first=True).double(), [normal(B, L, E)] * 3
    with pytest.raises(RuntimeError, match="is not implemented"):
        penalty_grads(layer, x)
    layer.__class__ = ours.MultiheadAttention
    assert all(bool(g.isfinite().all()) for g in penalty_grads(layer, x))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_gradcheck(need_weights, masked):
    mine = pair("MultiheadAttention", batch_first=True)[0]
    x, y = normal(2, 2, E).requires_grad_(), normal(2, 3, E).requires_grad_()
    mask = normal(2, 3).requires_grad_()
    padding = torch.tensor([[False, False, True], [True, True, True]])

    def run(x, y, mask):
        masks = {"attn_mask": mask, "key_padding_mask": padding} if masked else {}
        results = mine(x, y, y, need_weights=need_weights, **masks)
        return tuple(r for r in results if r is not None)

    assert gradcheck(run, (x, y, mask), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(run, (x, y, mask), fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("name", NAMES[1:3])
def test_layer_gradcheck(name):
    mine = pair(name, batch_first=True, norm_first=True, activation=torch.tanh)[0]
    tensors = [t[:2, :2].contiguous().requires_grad_() for t in inputs(name)]
    assert gradcheck(mine, tensors, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(mine, tensors, fast_mode=True)


def tangent(module, tensors, directions, **kwargs):
    run = lambda *t: first(call(module, t, kwargs))  # noqa: E731
    return torch.func.jvp(run, tuple(tensors), tuple(directions))[1]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_matches_unfused_torch(name, frozen):
    """Also of frozen layers in eval mode, where torch uses inference kernels without forward mode and raises."""
    mine, theirs = pair(name, batch_first=True)
    tensors = inputs(name)
    directions = [torch.randn_like(t) for t in tensors]
    with sdpa_kernel(SDPBackend.MATH):
        expected = tangent(theirs, tensors, directions)
    if frozen:
        mine.eval().requires_grad_(False)
    torch.testing.assert_close(tangent(mine, tensors, directions), expected, rtol=1e-9, atol=1e-9)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(tensors, directions, strict=True)]
        result = forward_ad.unpack_dual(first(call(mine, duals, {}))).tangent
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", NAMES[1:])
def test_reverse_over_forward_equals_forward_over_reverse(name, norm_first):
    """Reverse over forward is silently wrong with torch's layer norm."""
    mine = pair(name, batch_first=True, norm_first=norm_first, activation=torch.tanh)[0]
    tensors = inputs(name)
    direction = torch.randn_like(tensors[0])
    loss = lambda x: mine(x, *tensors[1:]).sin().sum()  # noqa: E731
    expected = torch.func.jvp(torch.func.grad(loss), (tensors[0],), (direction,))[1]
    result = torch.func.grad(lambda x: torch.func.jvp(loss, (x,), (direction,))[1])(tensors[0])
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    leaf = tensors[0].clone().requires_grad_()
    with forward_ad.dual_level():
        directional = forward_ad.unpack_dual(loss(forward_ad.make_dual(leaf, direction))).tangent
    torch.testing.assert_close(torch.autograd.grad(directional, leaf)[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_layer_norm_accuracy_under_transforms(dtype, autocast):
    norm, x = nn.LayerNorm((4, 32)).to(dtype), (3 + torch.randn(5, 4, 32)).to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = torch.func.vmap(lambda x: apply_norm(norm, x))(x)
        plain = norm(x)
    assert result.dtype == plain.dtype
    assert_accurate(result, plain, copy.deepcopy(norm).double()(x.double()))


def test_padding_is_not_skipped_under_transforms():
    mine, x = pair("TransformerEncoder", batch_first=True)[0].eval().requires_grad_(False), normal(B, L, E)
    padding, direction = padding_of(B, L), normal(B, L, E)
    valid = ~padding
    result = tangent(mine, [x], [direction], src_key_padding_mask=padding)
    step = 1e-6
    ends = [mine(x + sign * step * direction, src_key_padding_mask=padding) for sign in (1, -1)]
    torch.testing.assert_close(result[valid], ((ends[0] - ends[1]) / (2 * step))[valid], rtol=1e-5, atol=1e-6)
    mapped = torch.func.vmap(lambda x: mine(x, src_key_padding_mask=padding))(torch.stack((x, -x)))
    torch.testing.assert_close(mapped[0][valid], mine(x, src_key_padding_mask=padding)[valid])


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_inputs_and_parameters(name):
    mine = pair(name, batch_first=True)[0]
    tensors = inputs(name)
    stacked = [torch.stack((t.flip(0), t)) for t in tensors]
    run = lambda *t: first(call(mine, t, {}))  # noqa: E731
    expected = run(*tensors)
    torch.testing.assert_close(torch.func.vmap(run)(*stacked)[1], expected)
    parameters = {n: torch.stack((p.detach() * 2, p.detach())) for n, p in mine.named_parameters()}
    result = torch.func.vmap(
        lambda p: first(
            torch.func.functional_call(mine, p, tuple(tensors), {"need_weights": False} if name == NAMES[0] else {})
        )
    )(parameters)
    torch.testing.assert_close(result[1], expected)


# --------------------------------------------------------------------------------------------------
# Dropout


def test_attention_dropout_preserves_the_mean():
    layer = pair("MultiheadAttention", batch_first=True, dropout=0.4)[0]
    x = normal(1, L, E).expand(4000, -1, -1)
    expected = copy.deepcopy(layer).eval()(x[:1], x[:1], x[:1], need_weights=False)[0]
    for need_weights in (False, True):
        out, weights = layer(x, x, x, need_weights=need_weights, average_attn_weights=False)
        error = out.std(0) / 4000**0.5
        assert bool(((out.mean(0) - expected[0]).abs() < 5 * error).all())
        assert bool((out.std(0) > 0).all())
        if need_weights:
            assert abs(float((weights == 0).double().mean()) - 0.4) < 0.01
            joined = functional.merge_heads_projection(
                weights @ layer._project_qkv(x, x, x)[2], layer.out_proj.weight, layer.out_proj.bias
            )
            torch.testing.assert_close(joined, out)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", NAMES[1:3])
def test_branch_dropout_is_applied_before_the_residual(name, norm_first):
    layer = pair(name, batch_first=True, norm_first=norm_first, dropout=0.5)[0]
    tensors = inputs(name)
    torch.manual_seed(3)
    out = layer(*tensors)
    torch.manual_seed(3)
    assert torch.equal(out, layer(*tensors))
    assert not torch.equal(out, layer(*tensors))
    for module in layer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 1 - 1e-12  # drops the whole branch
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    expected = tensors[0]
    if not norm_first:
        for norm in (layer.norm1, layer.norm2, *([layer.norm3] if hasattr(layer, "norm3") else [])):
            expected = norm(expected)
    torch.testing.assert_close(layer(*tensors), expected)


# --------------------------------------------------------------------------------------------------
# Interchangeability with torch's instances


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        *((name, kwargs) for name in NAMES for kwargs in ({}, {"bias": False, "batch_first": True})),
        *((NAMES[0], kwargs) for kwargs in ({"kdim": 4}, {"vdim": 4, "bias": False}, {"add_bias_kv": True})),
    ],
)
def test_instances_match_torch_except_for_the_class(name, kwargs):
    mine, theirs = build(ours, name, **kwargs), build(nn, name, **kwargs)
    assert isinstance(mine, getattr(nn, name))
    assert list(mine.state_dict()) == list(theirs.state_dict())
    for (path, a), (_, b) in zip(mine.named_modules(), theirs.named_modules(), strict=True):
        assert set(vars(a)) == set(vars(b)), path
        assert type(a).__name__ == type(b).__name__
        assert type(a) is getattr(ours, type(b).__name__, type(b)), path
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), "same seed, same initialization"
    theirs.load_state_dict(mine.state_dict())
    mine.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_torch_instances_can_be_assigned_our_class(name):
    mine, theirs = pair(name, batch_first=True)
    expected = call(theirs, inputs(name), {})
    torch.manual_seed(0)
    for module in theirs.modules():
        if type(module).__name__ in NAMES:
            module.__class__ = getattr(ours, type(module).__name__)
    tensors = inputs(name)
    torch.testing.assert_close(call(theirs, tensors, {}), call(mine, tensors, {}), rtol=0, atol=0)
    assert first(expected).shape == first(call(theirs, tensors, {})).shape


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("swapped", ["stack", "layers", "attention"])
def test_mixed_torch_and_fastgen_layers(swapped, training):
    theirs = pair("TransformerEncoder", batch_first=True)[1].train(training)
    x, padding = normal(B, L, E), padding_of(B, L)
    run = lambda: theirs(x, src_key_padding_mask=padding)  # noqa: E731
    with torch.set_grad_enabled(training):
        expected = run()
        if swapped == "stack":
            theirs.__class__ = ours.TransformerEncoder
        for layer in theirs.layers:
            if swapped == "layers":
                layer.__class__ = ours.TransformerEncoderLayer
            elif swapped == "attention":
                layer.self_attn.__class__ = ours.MultiheadAttention
        torch.testing.assert_close(run(), expected)


def test_stacks_accept_torch_layers():
    layer = nn.TransformerDecoderLayer(E, H, 12, dropout=0.0).double()
    mine, theirs = ours.TransformerDecoder(layer, 2), nn.TransformerDecoder(layer, 2)
    assert_same(mine, theirs, inputs("TransformerDecoder", False), {"tgt_mask": mask_of("causal", L, L)})


def test_transformer_with_custom_encoder():
    custom = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 12), 1, enable_nested_tensor=False)
    model = ours.Transformer(E, H, 1, 1, 12, custom_encoder=custom)
    assert model.encoder is custom
    assert type(model.decoder) is ours.TransformerDecoder
    mask = ours.Transformer.generate_square_subsequent_mask(3)
    assert torch.equal(mask, nn.Transformer.generate_square_subsequent_mask(3))


class _Scaled(nn.Module):
    def forward(self, x):
        return 2 * x


class _Halved(ours.TransformerEncoderLayer):
    def _sa_block(self, *args, **kwargs):
        return super()._sa_block(*args, **kwargs) / 2


@pytest.mark.parametrize("change", ["hook", "pre-hook", "dropout", "subclass", "linear", "attention"])
def test_modified_sublayers_are_called(change):
    """The attention layer adds the residual only if that is not observable."""
    mine, theirs = pair("TransformerEncoderLayer", batch_first=True)
    outputs, x = [], normal(B, L, E)
    for layer in (mine, theirs):
        if change == "hook":
            layer.self_attn.register_forward_hook(lambda m, args, out: outputs.append(out[0].detach()))
        elif change == "pre-hook":
            layer.self_attn.register_forward_pre_hook(lambda m, args: outputs.append(args[0]))
        elif change == "dropout":
            layer.dropout1 = _Scaled()
        elif change == "linear":
            layer.linear2 = nn.Sequential(layer.linear2, _Scaled())
        elif change == "attention":
            layer.self_attn = pickle.loads(pickle.dumps(theirs.self_attn))
    if change == "subclass":
        mine.__class__ = _Halved
        plain = theirs.norm1(x + theirs._sa_block(x, None, None) / 2)
        torch.testing.assert_close(mine(x), theirs.norm2(plain + theirs._ff_block(plain)))
        return
    torch.testing.assert_close(mine(x), theirs(x))
    if "hook" in change:
        torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("unbatched", [True, False])
def test_attention_residual_argument(batch_first, unbatched):
    mine = pair("MultiheadAttention", batch_first=batch_first)[0]
    x = normal(L, E) if unbatched else inputs("TransformerEncoder", batch_first)[0]
    residual = torch.randn_like(x)
    for need_weights in (True, False):
        plain = mine(x, x, x, need_weights=need_weights)[0]
        result = mine(x, x, x, need_weights=need_weights, residual=residual)[0]
        torch.testing.assert_close(result, residual + plain)


# --------------------------------------------------------------------------------------------------
# Nested tensors


@pytest.mark.parametrize("name", NAMES[:2])
def test_nested_tensors_use_torch_inference_kernels(name):
    mine, theirs = (module.eval() for module in pair(name, batch_first=True))
    x = torch.nested.nested_tensor([normal(3, E), normal(L, E)])
    tensors = [x] * (3 if name == NAMES[0] else 1)
    with torch.no_grad():
        result, expected = (first(call(module, tensors, {})) for module in (mine, theirs))
    for a, b in zip(result.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(AssertionError, match=r"NestedTensor outside of its fast path.*training is enabled"):
        call(mine.train(), tensors, {})


# --------------------------------------------------------------------------------------------------
# Copies, export, compilation


@pytest.mark.parametrize("name", NAMES)
def test_pickles_and_copies(name):
    mine = pair(name)[0]
    tensors = inputs(name, False)
    expected = first(call(mine, tensors, {}))
    for other in (pickle.loads(pickle.dumps(mine)), copy.deepcopy(mine)):
        assert type(other) is type(mine)
        assert torch.equal(first(call(other, tensors, {})), expected)


def masks_for(name):
    return {
        "MultiheadAttention": {"key_padding_mask": padding_of(B, S)},
        "TransformerEncoderLayer": {"src_key_padding_mask": padding_of(B, L)},
        "TransformerEncoder": {"mask": mask_of("causal", L, L)},
        "TransformerDecoderLayer": {"tgt_mask": mask_of("bool causal", L, L), "tgt_is_causal": True},
        "TransformerDecoder": {"tgt_mask": mask_of("causal", L, L), "memory_key_padding_mask": padding_of(B, S)},
        "Transformer": {"tgt_mask": mask_of("bool causal", S, S)},
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_export(name):
    mine, tensors, masks = pair(name, batch_first=True)[0].eval(), inputs(name), masks_for(name)
    expected = mine(*tensors, **masks)
    program = torch.export.export(mine, tuple(tensors), masks)
    torch.testing.assert_close(program.module()(*tensors, **masks), expected)


@pytest.mark.parametrize("name", NAMES)
def test_compile_fullgraph(name):
    torch._dynamo.reset()
    mine, tensors, masks = pair(name, batch_first=True)[0], inputs(name), masks_for(name)
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    assert_same(compiled, mine, tensors, masks | ({"need_weights": False} if name == NAMES[0] else {}))


# --------------------------------------------------------------------------------------------------
# Errors


CONSTRUCTORS = [
    ("MultiheadAttention", (8, 3), {}, "num_heads: expected a divisor of embed_dim = 8, got 3"),
    ("MultiheadAttention", (0, 1), {}, "embed_dim: expected a positive integer, got 0"),
    ("MultiheadAttention", (8, -2), {}, "num_heads: expected a positive integer, got -2"),
    ("MultiheadAttention", (8, 2), {"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
    ("TransformerEncoderLayer", (8, 3), {}, "nhead: expected a divisor of d_model = 8, got 3"),
    ("TransformerDecoderLayer", (8, 3), {}, "nhead: expected a divisor of d_model = 8, got 3"),
    ("Transformer", (8, 3), {}, "nhead: expected a divisor of d_model = 8, got 3"),
    ("TransformerEncoderLayer", (8, 2), {"activation": "selu"}, "activation: expected 'relu', 'gelu' or a function"),
    ("TransformerDecoderLayer", (8, 2), {"dropout": -0.5}, r"dropout: expected a probability in \[0, 1\), got -0.5"),
]


@pytest.mark.parametrize(("name", "args", "kwargs", "text"), CONSTRUCTORS)
def test_invalid_constructor_arguments_raise(name, args, kwargs, text):
    with pytest.raises(ValueError, match=text):
        getattr(ours, name)(*args, **kwargs)
    if kwargs != {"dropout": 1.0}:
        with pytest.raises((AssertionError, ValueError, RuntimeError, ZeroDivisionError)):
            getattr(nn, name)(*args, **kwargs)


X, Y = torch.zeros(B, L, E), torch.zeros(B, S, E)
FLAGS = torch.zeros(L, S, dtype=torch.bool)
CALLS = {
    "rank of query": ((X[None], Y, Y), {}, r"query: expected \(B, L, 8\) or \(L, 8\), got \(1, 3, 5, 8\)"),
    "rank of key": ((X, Y[0], Y[0]), {}, r"key: expected \(B, S, 8\), got \(4, 8\)"),
    "channels of query": ((X[..., :6], Y, Y), {}, r"query: expected \(B, L, 8\), got \(3, 5, 6\)"),
    "channels of value": ((X, Y, Y[..., :6]), {}, r"value: expected \(B, S, 8\), got \(3, 4, 6\)"),
    "length of value": ((X, Y, X), {}, r"value: expected key's dims \(3, 4\) before its last, got \(3, 5, 8\)"),
    "batch of key": ((X, Y[:2], Y[:2]), {}, r"key: expected query's batch 3 in dim 0, got \(2, 4, 8\)"),
    "no tensor": ((X, [1.0], Y), {}, "key: expected a tensor, got list"),
    "integers": ((X.int(), Y, Y), {}, "query: expected a floating-point tensor, got torch.int32"),
    "dtypes": ((X, Y.double(), Y.double()), {}, "weight: expected the dtype of x, torch.float64, got torch.float32"),
    "rank of attn_mask": (
        (X, Y, Y),
        {"attn_mask": FLAGS[0]},
        r"attn_mask: expected \(L, S\) = \(5, 4\) or .*, got \(4,\)",
    ),
    "four dims": ((X, Y, Y), {"attn_mask": FLAGS[None, None]}, r"attn_mask: expected .*, got \(1, 1, 5, 4\)"),
    "shape of attn_mask": ((X, Y, Y), {"attn_mask": FLAGS.t()}, r"attn_mask: expected .*, got \(4, 5\)"),
    "heads of attn_mask": (
        (X, Y, Y),
        {"attn_mask": FLAGS.expand(B, L, S)},
        r"\(B \* num_heads, L, S\) = \(6, 5, 4\), got \(3, 5, 4\)",
    ),
    "integer mask": (
        (X, Y, Y),
        {"attn_mask": FLAGS.int()},
        r"attn_mask: expected a boolean \(True = masked\) or floating",
    ),
    "integer padding": (
        (X, Y, Y),
        {"key_padding_mask": torch.zeros(B, S).int()},
        "key_padding_mask: expected a boolean",
    ),
    "shape of padding": (
        (X, Y, Y),
        {"key_padding_mask": torch.zeros(S, B) > 0},
        r"key_padding_mask: expected shape \(B, S\) = \(3, 4\), got \(4, 3\)",
    ),
    "padding without a batch": (
        (X[0], Y[0], Y[0]),
        {"key_padding_mask": torch.zeros(1, S) > 0},
        r"key_padding_mask: expected shape \(S,\) = \(4,\), got \(1, 4\)",
    ),
    "hint without mask": ((X, Y, Y), {"is_causal": True}, "attn_mask: expected the causal mask .*, got None"),
    "residual": ((X, Y, Y), {"residual": Y}, r"residual: expected shape \(B, N, E\) = \(3, 5, 8\), got \(3, 4, 8\)"),
}


@pytest.mark.parametrize("case", CALLS)
def test_invalid_attention_arguments_raise(case):
    tensors, kwargs, text = CALLS[case]
    layer = ours.MultiheadAttention(E, H, batch_first=True)
    kind = TypeError if case in ("no tensor", "integers", "dtypes") or case.startswith("integer") else ValueError
    with pytest.raises(kind, match=text):
        layer(*tensors, **kwargs)
    if "residual" not in kwargs:
        with pytest.raises((AssertionError, RuntimeError, AttributeError, TypeError)):
            nn.MultiheadAttention(E, H, batch_first=True)(*tensors, **kwargs)


def test_invalid_layer_arguments_raise():
    with pytest.raises(TypeError, match="src: expected a tensor, got NoneType"):
        ours.TransformerEncoderLayer(E, H)(None)
    with pytest.raises(TypeError, match="memory: expected a tensor, got NoneType"):
        ours.TransformerDecoderLayer(E, H)(X, None)
    model = ours.Transformer(E, H, 1, 1, 12)
    with pytest.raises(ValueError, match=r"tgt: expected src's batch 5 in dim 1, got \(3, 4, 8\)"):
        model(X, Y)
    with pytest.raises(ValueError, match=r"src: expected \(N, 8\) or, with a batch, \(N, B, 8\), got \(3, 5, 6\)"):
        model(X[..., :6], Y)
    with pytest.raises(ValueError, match=r"tgt: expected .*, got \(4, 8\)"):
        model(X, Y[0])


@pytest.mark.parametrize(
    ("saved", "missing", "unexpected"),
    [
        ({"kdim": 4}, "in_proj_weight", "q_proj_weight"),
        ({"bias": False}, "in_proj_bias", None),
        ({"add_bias_kv": True}, None, "bias_k"),
    ],
)
def test_mismatched_state_dict_names_the_parameters(saved, missing, unexpected):
    state = build(nn, "MultiheadAttention", **saved).state_dict()
    layer = build(ours, "MultiheadAttention")
    with pytest.raises(RuntimeError) as caught:
        layer.load_state_dict(state)
    text = str(caught.value)
    assert missing is None or f'Missing key(s) in state_dict: "{missing}"' in text
    assert unexpected is None or f'Unexpected key(s) in state_dict: "{unexpected}"' in text
    keys = layer.load_state_dict(state, strict=False)
    assert missing is None or missing in keys.missing_keys
    with pytest.raises(RuntimeError, match=r"size mismatch for out_proj\.weight"):
        layer.load_state_dict(nn.MultiheadAttention(4, 2).state_dict())


def test_list_of_layers_is_complete():
    assert set(NAMES) == {n for n, t in vars(ours).items() if isinstance(t, type) and issubclass(t, nn.Module)
                          and t.__mro__[1] is getattr(nn, n, None) and n not in ("LSTM", "GRU")}  # fmt: skip
