"""``accelerate`` and ``restore`` with models of Hugging Face transformers."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import fastgen

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra integrations)")
if int(transformers.__version__.partition(".")[0]) < 5:
    pytest.skip(f"transformers >= 5 is needed, got {transformers.__version__}", allow_module_level=True)

import fastgen.integrations  # noqa: E402
from fastgen.integrations import transformers as integration  # noqa: E402
from tests.integrations.transformers_checks import (  # noqa: E402
    BY_NAME,
    GENERATING,
    MASKED,
    accelerated,
    difference,
    eager,
    in_new_form,
    output,
    over,
    padding,
    penalty_gradients,
    skip_unavailable,
    snapshot,
    tangent,
    values_and_gradients,
)
from tests.integrations.transformers_models import CASES, OTHERS, VOCABULARY  # noqa: E402


@pytest.fixture(autouse=True)
def available(request):
    skip_unavailable(request)


@pytest.fixture
def exact_softmax(monkeypatch):
    """Eager attention casts to float32 for its softmax; here it does not in models of float64."""
    original = torch.nn.functional.softmax

    def softmax(input, dim=None, _stacklevel=3, dtype=None):
        return original(input, dim=dim, dtype=None if input.dtype == torch.float64 else dtype)

    monkeypatch.setattr(torch.nn.functional, "softmax", softmax)


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


@over([BY_NAME["Llama"], BY_NAME["BERT"], BY_NAME["gpt-oss"], BY_NAME["Gemma 2"], BY_NAME["T5"]])
def test_output_attentions_are_those_of_eager(case, exact_softmax):
    model, x, mask = case.build().double(), case.input(), padding("right")
    expected = case.run(eager(model), x, mask, output_attentions=True)
    result = case.run(accelerated(model), x, mask, output_attentions=True)
    name = "encoder_attentions" if case.kind == "pairs" else "attentions"
    assert len(expected[name]) == 2
    for a, b in zip(result[name], expected[name], strict=True):
        torch.testing.assert_close(a[..., :6, :], b[..., :6, :], rtol=1e-9, atol=1e-12)


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
