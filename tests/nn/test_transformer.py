"""MultiheadAttention and Transformer layers against torch: values, gradients, low precision, dropout, nesting."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastgen import functional
from fastgen import nn as ours
from fastgen.testing import assert_accurate
from tests.nn.transformer_cases import (
    NAMES,
    B,
    E,
    H,
    L,
    S,
    assert_same,
    build,
    call,
    first,
    inputs,
    mask_of,
    normal,
    padding_of,
    pair,
)

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
