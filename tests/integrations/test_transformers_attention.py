"""Training, masks and the attention function of accelerated models of Hugging Face transformers."""

from __future__ import annotations

import pickle
from itertools import product

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastgen

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra integrations)")
if int(transformers.__version__.partition(".")[0]) < 5:
    pytest.skip(f"transformers >= 5 is needed, got {transformers.__version__}", allow_module_level=True)

from transformers import masking_utils  # noqa: E402

import fastgen.integrations  # noqa: E402
from fastgen.integrations import _transformers_attention as attention_module  # noqa: E402
from tests.integrations.transformers_checks import (  # noqa: E402
    BY_NAME,
    accelerated,
    difference,
    in_new_form,
    output,
    over,
    padding,
    parameters,
    penalty_gradients,
    skip_unavailable,
    values_and_gradients,
)


@pytest.fixture(autouse=True)
def available(request):
    skip_unavailable(request)


# --------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("reentrant", [False, True])
@over([BY_NAME["Llama"], BY_NAME["Gemma 2"], BY_NAME["BERT"]])
def test_gradient_checkpointing(case, reentrant):
    model, x = case.build().double(), case.input()
    accelerated(model).train()
    expected = values_and_gradients_in_training(case, model, x)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert difference(values_and_gradients_in_training(case, model, x), expected) < 1e-12


def values_and_gradients_in_training(case, model, x):
    """With dropout, whose random numbers are repeated."""
    torch.manual_seed(4)
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = output(case, model, x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *[p.grad for p in parameters(model) if p.grad is not None]]


def test_attention_dropout_is_applied_in_training():
    case = BY_NAME["Llama"]
    model, x = accelerated(case.build(attention_dropout=0.5)), case.input().float()
    assert torch.equal(output(case, model, x), output(case, model, x))
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    one, two = output(case, model, x), output(case, model, x)
    assert not torch.allclose(one, two)


def test_dropout_is_that_of_the_operator():
    q, k, v = (torch.randn(2, 4, 6, 8) for _ in range(3))
    layer = nn.Module()
    torch.manual_seed(5)
    out, weights = attention_module.attention(layer, q, k, v, None, dropout=0.5)
    torch.manual_seed(5)
    expected = fastgen.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True)
    assert weights is None
    assert torch.equal(out == 0, (expected == 0).transpose(1, 2))
    torch.testing.assert_close(out.transpose(1, 2), expected)


@over([BY_NAME["Llama"], BY_NAME["GPT-2"], BY_NAME["T5"]])
def test_lora_trains_merges_and_unloads(case):
    peft = pytest.importorskip("peft", reason="peft is not installed (the extra integrations)")
    targets = {"Llama": ["q_proj", "v_proj"], "GPT-2": ["c_attn"], "T5": ["q", "v"]}[case.name]

    def trained(change):
        torch.manual_seed(6)
        model = peft.get_peft_model(case.build().double(), peft.LoraConfig(r=2, target_modules=targets))
        change(model)
        model.eval()
        optimizer = torch.optim.SGD(parameters(model), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            output(case, model, case.input()).square().mean().backward()
            optimizer.step()
        return model

    def switch_to_eager(model):
        model.get_base_model().set_attn_implementation("eager")

    plain, ours = trained(switch_to_eager), trained(accelerated)
    assert any(bool(p.any()) for name, p in ours.named_parameters() if "lora_B" in name)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    x = case.input()
    adapted = output(case, ours, x)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(output(case, merged, x), adapted, rtol=1e-5, atol=1e-6)
    assert merged.config._attn_implementation == "fastgen"
    assert fastgen.restore(merged).replaced
    torch.testing.assert_close(output(case, merged, x), adapted, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Masks


class Shapes(TorchDispatchMode):
    """The shapes of all results that are stored at their size."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and 0 not in tensor.stride():
                self.shapes.append(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@over([BY_NAME["Mistral"], BY_NAME["Llama"], BY_NAME["gpt-oss"], BY_NAME["BERT"]])
def test_no_mask_of_queries_and_keys_is_built(case, padded):
    length = 59
    model = case.build()
    mask = padding("left", length=length) if padded else None
    square = {}
    for name in ("sdpa" if case.default == "sdpa" else "eager", "fastgen"):
        model.set_attn_implementation(name)
        with torch.no_grad(), Shapes() as seen:
            output(case, model, case.input(length=length).float(), mask)
        # Softmax attention on CPU computes in tiles, which are squares of 59 here: those have no batch of masks.
        square[name] = [
            shape for shape in seen.shapes if shape[-2:] == (length, length) and shape[:-2] in ((), (2, 1), (1, 1))
        ]
    assert square["fastgen"] == []
    if padded or case.name in ("Mistral", "gpt-oss"):
        assert square["sdpa" if case.default == "sdpa" else "eager"]


@over([BY_NAME["Mistral"], BY_NAME["BERT"], BY_NAME["Whisper"]])
def test_operators_get_padding_as_one_row(case, monkeypatch):
    model, seen = accelerated(case.build()), []
    attend = fastgen.functional.scaled_dot_product_attention

    def recording(query, key, value, mask, *args, **more):
        seen.append(mask)
        return attend(query, key, value, mask, *args, **more)

    monkeypatch.setattr(fastgen.functional, "scaled_dot_product_attention", recording)
    with torch.no_grad():
        output(case, model, case.input().float(), padding("right"))
    if case.kind == "tokens":
        assert [tuple(mask.shape) for mask in seen] == [(2, 1, 1, 9)] * 2
    else:
        assert seen == [None] * 6


def mask_requests():
    """Arguments of the mask function as transformers passes them, with and without a cache."""
    w = masking_utils
    config = transformers.MistralConfig(sliding_window=3)
    plain = transformers.LlamaConfig()
    pad = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) > 0.3
    for padding_mask, (queries, keys, past) in product((None, pad), ((6, 6, 0), (1, 6, 5), (2, 6, 4), (3, 6, 0))):
        place = {"q_length": queries, "q_offset": past, "device": "cpu"}
        if not in_new_form():
            place = {"cache_position": torch.arange(queries) + past}
        common = {"batch_size": 2, "kv_length": keys, "kv_offset": 0, "attention_mask": padding_mask, **place}
        causal, sliding = w.causal_mask_function, w.sliding_window_causal_mask_function(3)
        yield {**common, "mask_function": causal, "config": plain}
        yield {**common, "mask_function": causal, "config": plain, "allow_is_causal_skip": False}
        yield {**common, "mask_function": sliding, "config": config, "local_size": 3}
        both = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
        yield {**common, "mask_function": w.bidirectional_mask_function, "config": plain, **both}
        if hasattr(w, "sliding_window_bidirectional_mask_function"):
            wide = w.sliding_window_bidirectional_mask_function(3)
            yield {**common, "mask_function": wide, "config": config, "local_size": 3, **both}
        chunked = transformers.Llama4TextConfig(attention_chunk_size=3)
        chunked.sliding_window = 3
        chunks = w.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long))
        yield {**common, "mask_function": chunks, "config": chunked, "local_size": 3}


def test_masks_equal_those_of_transformers():
    kinds = set()
    for request in mask_requests():
        mask = attention_module.attention_mask(**request)
        kinds.add(type(mask).__name__)
        expected = masking_utils.sdpa_mask(
            **{**request, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        )
        queries, keys = expected.shape[-2:]
        if mask is None and request.get("allow_is_bidirectional_skip"):
            result = torch.ones_like(expected)
        elif mask is None:  # causal where there is more than one query
            result = torch.ones_like(expected).tril(0 if queries > 1 else keys)
        else:
            result = mask.dense() if isinstance(mask, attention_module.WindowMask) else mask
        assert torch.equal(result.expand_as(expected), expected)
    assert kinds == {"NoneType", "Tensor", "WindowMask"}


def test_window_masks_act_as_the_tensor_that_they_stand_for():
    pad = torch.tensor([[True, True, False], [False, True, True]])
    mask = attention_module.WindowMask(pad, 1, 0, (2, 1, 3, 3), torch.device("cpu"))
    dense = mask.dense()
    assert mask.shape == dense.shape
    assert mask.dtype == torch.bool
    assert torch.equal(mask[:, :, :2], dense[:, :, :2])
    assert torch.equal(~mask, ~dense)
    zeros = torch.zeros(2, 1, 3, 3)
    assert torch.equal(torch.where(mask, zeros, 1.0), torch.where(dense, zeros, 1.0))
    assert torch.equal(zeros + mask, zeros + dense)
    assert torch.equal(torch.cat([mask, mask]), torch.cat([dense, dense]))
    assert torch.equal(pickle.loads(pickle.dumps(mask)).dense(), dense)


@over([BY_NAME["Llama"], BY_NAME["Mistral"], BY_NAME["BERT"], BY_NAME["gpt-oss"], BY_NAME["Gemma 2"]])
def test_fully_padded_rows_are_finite(case):
    model, x = accelerated(case.build()), case.input().float()
    mask = padding("left")
    mask[1] = 0
    results = values_and_gradients(case, model, x, mask)
    assert all(bool(r.isfinite().all()) for r in results)
    assert all(bool(r.isfinite().all()) for r in penalty_gradients(case, model, x, mask))


@over([BY_NAME["Llama"], BY_NAME["Mistral"]])
def test_compile_in_one_graph_with_padding(case):
    torch._dynamo.reset()
    model, x, mask = accelerated(case.build()), case.input().float(), padding("left")
    expected = values_and_gradients(case, model, x, mask)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert difference(values_and_gradients(case, compiled, x, mask), expected) < 1e-5


def test_compiled_models_are_recompiled():
    torch._dynamo.reset()
    case = BY_NAME["Llama"]
    model = case.build(num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = case.input().float()
    before = output(case, compiled, x)
    report = fastgen.accelerate(compiled)
    assert report.replaced["_orig_mod.model.layers.0.self_attn"] == (
        "LlamaAttention: sdpa -> fastgen, recompiled at its next call"
    )
    torch.testing.assert_close(output(case, compiled, x), before, rtol=1e-4, atol=1e-4)
    penalty_gradients(case, compiled, x)


# --------------------------------------------------------------------------------------------------
# The attention function


def attention_inputs():
    generator = torch.Generator().manual_seed(7)
    shapes = ((1, 2, 3, 2), (1, 1, 2, 2), (1, 1, 2, 3))
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("option", ["sinks", "softcap", "both", "bias"])
def test_all_derivatives(option):
    q, k, v = attention_inputs()
    extra = {
        "sinks": {"s_aux": torch.randn(2, dtype=torch.float64, requires_grad=True)},
        "softcap": {"softcap": 0.7},
        "both": {"s_aux": torch.randn(2, dtype=torch.float64, requires_grad=True), "softcap": 0.7},
        "bias": {"position_bias": torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)},
    }[option]
    names = [name for name in extra if isinstance(extra[name], torch.Tensor)]
    mask = torch.tensor([[False, False], [True, False], [True, True]])

    def function(q, k, v, *tensors):
        arguments = {**extra, **dict(zip(names, tensors, strict=True))}
        return attention_module.attention(nn.Module(), q, k, v, mask, scaling=0.9, **arguments)[0]

    inputs = (q, k, v, *[extra[name] for name in names])
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("weighted", [False, True], ids=["fused", "with weights"])
def test_softcap_is_the_formula(weighted):
    q, k, v = attention_inputs()
    result, weights = attention_module.attention(
        nn.Module(), q, k, v, None, scaling=0.9, softcap=0.7, output_attentions=weighted
    )
    scores = 0.7 * torch.tanh(0.9 * q @ k.repeat_interleave(2, 1).mT / 0.7)
    expected = scores.masked_fill(torch.ones(3, 2).triu(1).bool(), -torch.inf).softmax(-1)
    if weighted:
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-14)
    else:
        assert weights is None
    torch.testing.assert_close(result.transpose(1, 2), expected @ v.repeat_interleave(2, 1), rtol=0, atol=1e-14)


def test_arguments_without_an_equivalent_raise():
    q, k, v = attention_inputs()
    with pytest.raises(TypeError, match=r"indices: fastgen's attention has no such argument, Module needs it"):
        attention_module.attention(nn.Module(), q, k, v, None, indices=torch.zeros(1))
    attention_module.attention(nn.Module(), q, k, v, None, indices=None, anything=torch.zeros(1))
    with pytest.raises(TypeError, match=r"cu_seq_lens_q: expected packed sequences with position_ids or a mask"):
        attention_module.attention(nn.Module(), q, k, v, None, cu_seq_lens_q=torch.tensor([0, 1, 3]))
    attention_module.attention(nn.Module(), q, k, v, None, cu_seq_lens_q=torch.tensor([0, 3]))


@over([BY_NAME["Llama"], BY_NAME["Mistral"]])
def test_packed_sequences_are_separate(case):
    """Several sequences in one item, told apart by their positions."""
    model, x = accelerated(case.build()).double(), case.input(batch=1)
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
    packed = output(case, model, x, position_ids=positions)
    parts = [output(case, model, part) for part in (x[:, :4], x[:, 4:])]
    torch.testing.assert_close(packed, torch.cat(parts, 1), rtol=1e-6, atol=1e-6)
