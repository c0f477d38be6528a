"""diffusers' models: ``accelerate`` and ``restore``."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn.utils import parametrizations, prune

import fastgen
from tests.integrations.contract import Contract, Model, assert_equal
from tests.integrations.diffusers_models import CASES

try:
    import diffusers
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
except Exception as error:  # diffusers wraps the errors of its imports in RuntimeError
    pytest.skip(f"diffusers cannot be imported: {error}", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=CASES, ids=[case.name for case in CASES])
def case(request):
    return request.param


class TestDiffusers(Contract):
    pass


def condition():
    return Model(CASES[1])


def names(model):
    return [name for name, part in model.module.named_modules() if isinstance(part, Attention)]


def test_processors_are_left_as_they_are():
    model = condition()
    before = dict(model.module.attn_processors)
    forward = inspect.signature(Attention.forward)
    fastgen.accelerate(model.module)
    assert {name: id(processor) for name, processor in model.module.attn_processors.items()} == {
        name: id(processor) for name, processor in before.items()
    }
    assert inspect.signature(model.module.get_submodule(names(model)[0]).__class__.forward) == forward


def test_processors_set_afterwards_are_accelerated():
    model = condition()
    expected = model().detach()
    fastgen.accelerate(model.module)
    model.module.set_attn_processor(AttnProcessor2_0())
    model.r1()
    model.module.set_default_attn_processor()
    model.r1()
    model.module.fuse_qkv_projections()
    assert_equal([model().detach()], [expected])
    model.r1()
    model.module.unfuse_qkv_projections()
    model.r1()


def test_a_processor_with_its_own_softmax_is_named():
    model = condition()
    model.module.set_attn_processor(AttnProcessor())
    report = fastgen.accelerate(model.module)
    reason = "its processor AttnProcessor computes the softmax itself; set another one"
    assert report.kept == dict.fromkeys(names(model), reason)
    assert not report.replaced
    model.module.set_attn_processor(AttnProcessor2_0())
    assert list(fastgen.accelerate(model.module).replaced) == names(model)


def test_one_kept_module_among_redirected_ones():
    model = condition()
    first, *others = names(model)
    model.module.get_submodule(first).set_processor(AttnProcessor())
    report = fastgen.accelerate(model.module)
    assert list(report.kept) == [first]
    assert list(report.replaced) == others


class OwnProcessor:
    """A user's processor: attention to the text only, without heads."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        other = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(other), attn.to_v(other)
        return attn.to_out[0](torch.nn.functional.scaled_dot_product_attention(query, key, value))


def test_a_users_processor_is_accelerated():
    model = condition()
    model.module.set_attn_processor(OwnProcessor())
    expected = model().detach()
    assert list(fastgen.accelerate(model.module).replaced) == names(model)
    assert_equal([model().detach()], [expected])
    model.r1()


def test_attention_backends():
    if not hasattr(diffusers.ModelMixin, "set_attention_backend"):
        pytest.skip("this version has no attention backends")
    model = Model(CASES[5])
    expected = model().detach()
    model.module.set_attention_backend("_native_math")
    assert len(fastgen.accelerate(model.module).replaced) == 2
    assert_equal([model().detach()], [expected])
    fastgen.restore(model.module)
    model.module.set_attention_backend("flex")
    report = fastgen.accelerate(model.module)
    assert not report.replaced
    reason = 'its attention backend is "flex"; call set_attention_backend("native") first'
    assert list(report.kept.values()) == [reason] * 2


def test_two_models_with_one_processor_are_independent():
    a, b, processor = condition(), condition(), AttnProcessor2_0()
    a.module.set_attn_processor(processor)
    b.module.set_attn_processor(processor)
    fastgen.accelerate(a.module)
    a.r1()
    with pytest.raises(RuntimeError, match="is not implemented"):
        b.r1()


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(lambda module, args, out: 2 * out),
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
        lambda layer: torch.nn.utils.spectral_norm(layer),
        lambda layer: parametrizations.spectral_norm(layer),
    ],
    ids=["hook", "pruning", "spectral norm by hook", "spectral norm by parametrization"],
)
def test_changed_projections_keep_working(change):
    model = condition()
    plain = model().detach()
    for name in names(model):
        change(model.module.get_submodule(name).to_q)
    model.module.eval()
    fastgen.accelerate(model.module)
    actual = model().detach()
    fastgen.restore(model.module)
    assert_equal([actual], [model().detach()])
    assert (actual - plain).abs().max() > 1e-3


def test_lora_can_be_trained_merged_and_unloaded():
    try:
        import peft
    except ImportError as error:
        pytest.skip(f"peft cannot be imported: {error}")
    model = condition()
    before = model().detach()
    fastgen.accelerate(model.module)
    model.module.add_adapter(peft.LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights=False))
    model.module.double()
    trained = [parameter for name, parameter in model.module.named_parameters() if "lora" in name]
    assert all(bool(g.any()) for g in torch.autograd.grad(model().square().sum(), trained))
    changed = model().detach()
    assert (changed - before).abs().max() > 1e-3
    model.module.fuse_lora()
    assert_equal([model().detach()], [changed])
    model.module.unfuse_lora()
    model.module.unload_lora()
    fastgen.restore(model.module)
    assert_equal([model().detach()], [before])


def test_saved_and_loaded_by_diffusers(tmp_path):
    model = condition()
    expected = model().detach()
    fastgen.accelerate(model.module)
    model.module.save_pretrained(tmp_path)
    model.module = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert_equal([model().detach()], [expected])
