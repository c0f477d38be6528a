"""``accelerate`` and ``restore`` with models of Hugging Face transformers."""

from __future__ import annotations

import copy
import functools
import inspect
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
from fastgen.integrations import transformers as integration  # noqa: E402
from tests.integrations.transformers_models import CASES, OTHERS, VOCABULARY  # noqa: E402

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


@pytest.fixture(autouse=True)
def available(request):
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    if case and not hasattr(transformers, case.model):
        pytest.skip(f"transformers {transformers.__version__} has no {case.model}")
    if case and case.oldest > VERSION:
        pytest.skip(f"{case.name} computes attention itself in transformers {transformers.__version__}")


@pytest.fixture
def exact_softmax(monkeypatch):
    """Eager attention casts to float32 for its softmax; here it does not in models of float64."""
    original = torch.nn.functional.softmax

    def softmax(input, dim=None, _stacklevel=3, dtype=None):
        return original(input, dim=dim, dtype=None if input.dtype == torch.float64 else dtype)

    monkeypatch.setattr(torch.nn.functional, "softmax", softmax)


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


# --------------------------------------------------------------------------------------------------
# The columns of the table in docs/integrations.md


@over(CASES)
def test_outputs_and_gradients_equal_eager(case, exact_softmax):
    model, x = case.build().double(), case.input()
    expected = values_and_gradients(case, eager(model), x)
    results = values_and_gradients(case, accelerated(model), x)
    assert difference(results[:1], expected[:1]) < 1e-12
    assert difference(results[1:], expected[1:]) < 1e-12


@over(OTHERS)
def test_outputs_and_gradients_of_other_models_without_sdpa_equal_eager(case, exact_softmax):
    model, x, mask = case.build().double(), case.input(), padding("left")
    expected = values_and_gradients(case, eager(model), x, mask)
    sinks_in_float32 = case.name.startswith("Granite")
    tolerance = 5e-6 if sinks_in_float32 else 1e-12
    assert difference(values_and_gradients(case, accelerated(model), x, mask), expected) < tolerance


@pytest.mark.parametrize("side", ["left", "right"])
@over(MASKED)
def test_outputs_and_gradients_equal_eager_with_padding(case, side, exact_softmax):
    model, x, mask = case.build().double(), case.input(), padding(side)
    expected = values_and_gradients(case, eager(model), x, mask)
    results = values_and_gradients(case, accelerated(model), x, mask)
    assert difference(results[:1], expected[:1]) < 1e-12
    assert difference(results[1:], expected[1:]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@over(CASES)
def test_low_precision_errors_are_at_most_twice_those_of_eager(case, dtype, exact_softmax):
    model = case.build().to(dtype)
    x = case.input().to(dtype)
    expected = values_and_gradients(case, eager(model).double(), x.double())
    plain = values_and_gradients(case, eager(model), x)
    ours = values_and_gradients(case, accelerated(model), x)

    def errors(results):
        yield difference([results[0].double()], expected[:1])
        yield difference([r.double() for r in results[1:]], expected[1:])

    for ours_error, plain_error in zip(errors(ours), errors(plain), strict=True):
        assert ours_error <= 2 * plain_error + 2 * torch.finfo(dtype).eps


@over(CASES)
def test_r1_penalty_raises_before_and_works_after(case, exact_softmax):
    model, x = case.build().double(), case.input()
    expected = penalty_gradients(case, eager(model), x)
    if model.config._attn_implementation == "sdpa":
        with pytest.raises(RuntimeError, match="is not implemented"):
            penalty_gradients(case, model, x)
    else:
        assert case.default == "eager"
    assert difference(penalty_gradients(case, accelerated(model), x), expected) < 1e-12
    fastgen.restore(model)
    if model.config._attn_implementation == "sdpa":
        with pytest.raises(RuntimeError, match="is not implemented"):
            penalty_gradients(case, model, x)


@over(CASES)
def test_jvp_raises_before_and_works_after(case, exact_softmax):
    model, x = case.build().double(), case.input()
    expected = tangent(case, eager(model), x)
    if model.config._attn_implementation == "sdpa":
        with pytest.raises(RuntimeError, match="forward AD"):
            tangent(case, model, x)
    assert difference(tangent(case, accelerated(model), x)[1:], expected[1:]) < 1e-12


def prompt(case, length=7):
    """(arguments of generate for a batch of two, the first padded on the left)."""
    if case.kind == "speech":
        return {"input_features": case.input().float()}
    tokens = torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(3))
    mask = padding("left", length=length)
    return {"input_ids": tokens * mask, "attention_mask": mask}


def generated(case, model, cache):
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "cache_implementation": cache}
    return model.generate(**prompt(case), **options, disable_compile=True)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@over(GENERATING)
def test_generate_gives_the_same_tokens(case, cache):
    model = case.build()
    expected = generated(case, eager(model), cache)
    assert torch.equal(generated(case, accelerated(model), cache), expected)
    assert expected.unique().numel() > 3


def calls_of(case, model, compile):
    """Outputs of a forward pass over a prompt into a static cache, and of the next token, of a compiled model."""
    if case.kind in ("pixels", "speech", "pairs") or not case.generates:
        return [output(case, compile(model), case.input().float())]
    run = compile(lambda *args, **more: model(*args, **more).logits)
    tokens, outs = prompt(case)["input_ids"] + 3, []
    try:
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    except TypeError:
        cache = transformers.StaticCache(config=model.config, max_batch_size=2, max_cache_len=16)
    with torch.no_grad():
        for start, part in ((0, tokens), (tokens.size(1), tokens[:, :1])):
            # Before 5.3 the model reads the positions from the cache, which breaks the graph, unless they are given.
            position = {} if in_new_form() else {"cache_position": torch.arange(start, start + part.size(1))}
            outs.append(run(input_ids=part, past_key_values=cache, use_cache=True, **position))
    return outs


@over(CASES)
def test_compile_in_one_graph(case):
    model = case.build()
    with torch.no_grad():
        expected = calls_of(case, eager(model), lambda function: function)
        torch._dynamo.reset()
        backend = "aot_eager" if case.name == "Mistral" else "eager"
        compile = functools.partial(torch.compile, backend=backend, fullgraph=True)
        results = calls_of(case, accelerated(model), compile)
    assert difference(results, expected) < 1e-5


# --------------------------------------------------------------------------------------------------
# The model before, during and after


@over(CASES)
def test_every_attention_layer_is_in_the_report(case):
    model = case.build()
    before = model.config._attn_implementation
    report = fastgen.accelerate(model)
    attention = {name: part for name, part in model.named_modules() if integration._looks_up(type(part))}
    expected = {name: f"{type(part).__name__}: {before} -> fastgen" for name, part in attention.items()}
    assert len(attention) >= 2
    assert report == fastgen.AccelerationReport(expected, {})
    assert fastgen.accelerate(model) == fastgen.AccelerationReport(
        {}, {name: f"already accelerated: {type(part).__name__}" for name, part in attention.items()}
    )
    back = {name: f"{type(part).__name__}: fastgen -> {before}" for name, part in attention.items()}
    assert fastgen.restore(model) == fastgen.AccelerationReport(back, {})
    assert fastgen.restore(model) == fastgen.AccelerationReport({}, {})


@over(CASES)
def test_state_dict_is_untouched_and_restore_is_exact(case):
    model, x = case.build(), case.input().float()
    state, dictionary = copy.deepcopy(model.state_dict()), model.config.to_dict()
    before, original = output(case, model, x), snapshot(model)
    formula = output(case, eager(model), x)  # sdpa ignores softcap in early versions of transformers
    accelerated(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert model.config.to_dict() == dictionary
    torch.testing.assert_close(output(case, model, x), formula, rtol=1e-3, atol=1e-4)
    fastgen.restore(model)
    assert snapshot(model) == original
    assert torch.equal(output(case, model, x), before)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("copied", COPIES)
@over([BY_NAME["Mistral"], BY_NAME["T5"], BY_NAME["gpt-oss"]])
def test_copies_are_independent(case, copied):
    model, x = case.build(), case.input().float()
    before = output(case, model, x)
    implementation = model.config._attn_implementation
    other = COPIES[copied](model)
    accelerated(other)
    assert model.config._attn_implementation == implementation
    accelerated(model)
    fastgen.restore(other)
    during = COPIES[copied](model)
    assert torch.equal(output(case, during, x), output(case, model, x))
    assert fastgen.restore(during).replaced
    assert during.config._attn_implementation == implementation
    assert torch.equal(output(case, during, x), before)
    assert model.config._attn_implementation == "fastgen"
    fastgen.restore(model)
    assert torch.equal(output(case, COPIES[copied](model), x), before)


@over([BY_NAME["Llama"], BY_NAME["T5"]])
def test_save_pretrained_before_during_and_after(case, tmp_path):
    model, x = case.build(), case.input().float()
    before = output(case, model, x)
    steps = {"before": lambda: None, "during": lambda: accelerated(model), "after": lambda: fastgen.restore(model)}
    for step, change in steps.items():
        change()
        model.save_pretrained(tmp_path / step)
        assert "fastgen" not in (tmp_path / step / "config.json").read_text()
        other = type(model).from_pretrained(tmp_path / step).eval()
        assert other.config._attn_implementation == "sdpa"
        assert torch.equal(output(case, other, x), before)


def test_a_part_of_a_model_is_restored_with_the_model():
    """Parts share the config of the model."""
    model = accelerated(BY_NAME["Llama"].build())
    assert set(fastgen.restore(model.model).replaced) == {"layers.0.self_attn", "layers.1.self_attn"}
    assert model.config._attn_implementation == "sdpa"
    assert fastgen.restore(model) == fastgen.AccelerationReport({}, {})


def test_restore_keeps_an_implementation_that_was_selected_since():
    model = accelerated(BY_NAME["Llama"].build())
    model.set_attn_implementation("eager")
    assert fastgen.restore(model) == fastgen.AccelerationReport({}, {})
    assert model.config._attn_implementation == "eager"
    assert not any(integration._MARK in vars(part) for part in model.modules())


def test_other_models_are_unaffected():
    one, other = (transformers.BertModel(transformers.BertConfig(**BY_NAME["BERT"].arguments)) for _ in range(2))
    accelerated(one)
    assert other.config._attn_implementation == "sdpa"
    model = nn.ModuleDict({"one": one, "other": other, "torch": nn.LSTM(2, 2)})
    report = fastgen.accelerate(model)
    assert set(report.replaced) == {
        "other.encoder.layer.0.attention.self",
        "other.encoder.layer.1.attention.self",
        "torch",
    }
    assert set(report.kept) == {"one.encoder.layer.0.attention.self", "one.encoder.layer.1.attention.self"}
    assert len(fastgen.restore(model).replaced) == 5


def test_composite_models_switch_in_every_part():
    vision = transformers.ViTConfig(**BY_NAME["ViT"].arguments)
    text = transformers.GPT2Config(**BY_NAME["GPT-2"].arguments, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    model = transformers.VisionEncoderDecoderModel(config).double().eval()
    pixels = BY_NAME["ViT"].input().requires_grad_()

    def penalty():
        y = model(pixel_values=pixels, decoder_input_ids=torch.arange(5).expand(2, 5)).logits
        (gradient,) = torch.autograd.grad(y.square().sum(), pixels, create_graph=True)
        gradient.square().sum().backward()

    original = snapshot(model)
    with pytest.raises(RuntimeError, match="is not implemented"):
        penalty()
    model.zero_grad()
    report = fastgen.accelerate(model)
    assert len(report.replaced) == 6
    assert not report.kept
    penalty()
    fastgen.restore(model)
    assert snapshot(model)[1] == original[1]


# --------------------------------------------------------------------------------------------------
# Layers that are kept


def test_layers_without_the_interface_are_kept():
    config = transformers.DebertaV2Config(**SIZES_OF_DEBERTA)
    model = transformers.DebertaV2Model(config).eval()
    original = snapshot(model)
    report = fastgen.accelerate(model)
    reason = "DisentangledSelfAttention computes attention itself, without transformers.AttentionInterface"
    assert report == fastgen.AccelerationReport({}, {"encoder.layer.0.attention.self": reason})
    assert snapshot(model) == original


SIZES_OF_DEBERTA = {**BY_NAME["BERT"].arguments, "num_hidden_layers": 1}


def test_layers_with_unknown_arguments_are_kept(monkeypatch):
    monkeypatch.setattr(integration, "ARGUMENTS", integration.ARGUMENTS - {"sliding_window"})
    model = BY_NAME["Mistral"].build()
    report = fastgen.accelerate(model)
    assert not report.replaced
    reason = "MistralAttention passes sliding_window to its attention function, which fastgen's does not have"
    assert set(report.kept.values()) == {reason}
    assert model.config._attn_implementation == "sdpa"


def test_layers_that_share_a_config_with_a_kept_layer_are_kept(monkeypatch):
    """Where masks are those of eager attention; fastgen's function would get its own, which the other cannot take."""

    class StrangeAttention(nn.Module):
        pass

    model = BY_NAME["Llama"].build()
    model.model.layers[0].strange = StrangeAttention()
    assert len(fastgen.accelerate(model).replaced) == 2
    fastgen.restore(model)
    model.set_attn_implementation("eager")
    report = fastgen.accelerate(model)
    assert not report.replaced
    shared = "shares its config with model.layers.0.strange, which is kept"
    assert list(report.kept.values()).count(shared) == 2
    assert model.config._attn_implementation == "eager"


def test_models_without_sdpa_that_are_not_known_are_kept(monkeypatch):
    monkeypatch.setattr(integration, "_WITHOUT_SDPA", frozenset())
    report = fastgen.accelerate(BY_NAME["gpt-oss"].build())
    assert not report.replaced
    assert all("does not support sdpa, and has not been tested" in reason for reason in report.kept.values())


def test_a_layer_outside_its_model_is_kept():
    layer = BY_NAME["Llama"].build().model.layers[0]
    report = fastgen.accelerate(layer)
    assert report.kept == {
        "self_attn": "LlamaAttention takes its function from its model's config: accelerate that model"
    }


# --------------------------------------------------------------------------------------------------
# register


def test_register_selects_fastgen_by_name(tmp_path):
    fastgen.integrations.register()
    case = BY_NAME["Llama"]
    case.build().save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="fastgen").double()
    assert model.config._attn_implementation == "fastgen"
    penalty_gradients(case, model, case.input())
    report = fastgen.accelerate(model)
    assert set(report.kept.values()) == {'constructed with attn_implementation="fastgen"'}
    assert fastgen.restore(model) == fastgen.AccelerationReport({}, {})
    assert model.config._attn_implementation == "fastgen"
    config = transformers.LlamaConfig(**case.arguments, attn_implementation="fastgen")
    assert transformers.LlamaForCausalLM(config).config._attn_implementation == "fastgen"


def test_available_names_the_version():
    assert fastgen.integrations.available()["transformers"] == f"{transformers.__version__} (possible)"


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
    assert torch.equal(COPIES["pickle"](mask).dense(), dense)


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


@over([BY_NAME["Llama"], BY_NAME["BERT"], BY_NAME["gpt-oss"], BY_NAME["Gemma 2"], BY_NAME["T5"]])
def test_output_attentions_are_those_of_eager(case, exact_softmax):
    model, x, mask = case.build().double(), case.input(), padding("right")
    expected = case.run(eager(model), x, mask, output_attentions=True)
    result = case.run(accelerated(model), x, mask, output_attentions=True)
    name = "encoder_attentions" if case.kind == "pairs" else "attentions"
    assert len(expected[name]) == 2
    for a, b in zip(result[name], expected[name], strict=True):
        torch.testing.assert_close(a[..., :6, :], b[..., :6, :], rtol=1e-9, atol=1e-12)


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
