"""Transformer layers as modules: interchangeability with torch, copies, export, compilation, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fastgen import nn as ours
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
