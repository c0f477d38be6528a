"""timm's models: ``accelerate`` and ``restore``."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastgen
from tests.integrations.contract import Contract, Model, assert_equal
from tests.integrations.timm_models import CASES, PLAIN, case_of

try:  # timm imports torchvision, which fails with other errors than ImportError where it does not match torch
    import timm  # noqa: F401
except Exception as error:
    pytest.skip(f"timm cannot be imported: {error}", allow_module_level=True)


@pytest.fixture(params=CASES, ids=[case.name for case in CASES])
def case(request):
    try:
        Model(request.param)()
    except RuntimeError as error:
        pytest.skip(f"this version of timm does not run the model in float64: {error}")
    return request.param


class TestTimm(Contract):
    pass


def vit():
    return Model(CASES[0])


def swin_v2():
    return Model(CASES[3])


def test_kept_modules_are_named_with_the_reason():
    report = fastgen.accelerate(Model(CASES[4]).module)
    assert report.kept == {
        f"blocks.{i}.attn": "timm.models.cait.TalkingHeadAttn mixes heads before and after the softmax" for i in (0, 1)
    }


def test_accelerating_again_changes_nothing():
    model = vit()
    first = fastgen.accelerate(model.module)
    classes = [type(part) for part in model.module.modules()]
    second = fastgen.accelerate(model.module)
    assert second.replaced == {}
    assert second.kept == dict.fromkeys(first.replaced, "already accelerated: " + ATTENTION)
    assert [type(part) for part in model.module.modules()] == classes


ATTENTION = f"{type(vit().module.blocks[0].attn).__module__}.Attention"


@pytest.mark.parametrize("step", ["attn_drop", "softmax"])
def test_hooks_on_the_attention_weights_are_called(step):
    model = swin_v2()
    weights = []
    before = model().detach()
    for part in model.module.modules():
        if hasattr(part, "attn_drop"):
            getattr(part, step).register_forward_hook(lambda module, args, out: weights.append(out))
    fastgen.accelerate(model.module)
    assert_equal([model().detach()], [before])
    assert len(weights) == 4
    torch.testing.assert_close(weights[0].sum(-1), torch.ones_like(weights[0].sum(-1)))


def test_hooks_keep_timms_own_softmax_where_it_was_chosen():
    model = vit()
    attention = model.module.blocks[0].attn
    attention.fused_attn = False
    fastgen.accelerate(model.module)
    assert attention.fused_attn is True
    weights = []
    handle = attention.attn_drop.register_forward_hook(lambda module, args, out: weights.append(out))
    assert attention.fused_attn is False
    model()
    assert len(weights) == 1
    handle.remove()
    assert attention.fused_attn is True
    fastgen.restore(model.module)
    assert attention.fused_attn is False


@pytest.mark.parametrize(
    "change",
    [
        lambda qkv: qkv.register_forward_hook(lambda module, args, out: 2 * out),
        lambda qkv: prune.random_unstructured(qkv, "weight", 0.5),
        lambda qkv: nn.utils.spectral_norm(qkv),
        lambda qkv: parametrizations.spectral_norm(qkv),
    ],
    ids=["hook", "pruning", "spectral norm by hook", "spectral norm by parametrization"],
)
@pytest.mark.parametrize("after", [False, True])
def test_changed_projections_keep_working(change, after):
    model = vit()
    plain = model().detach()
    if after:
        fastgen.accelerate(model.module)
    for block in model.module.blocks:
        change(block.attn.qkv)
    model.module.eval()
    if not after:
        fastgen.accelerate(model.module)
    actual = model().detach()
    fastgen.restore(model.module)
    assert_equal([actual], [model().detach()])
    assert (actual - plain).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore")
def test_lora_can_be_trained_merged_and_unloaded():
    try:
        import peft
    except ImportError as error:
        pytest.skip(f"peft cannot be imported: {error}")
    model = vit()
    before = model().detach()
    fastgen.accelerate(model.module)
    adapted = peft.get_peft_model(model.module, peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False))
    adapted = adapted.double()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert all(bool(g.any()) for g in torch.autograd.grad(model(module=adapted).square().sum(), trained))
    changed = model(module=adapted).detach()
    assert (changed - before).abs().max() > 1e-3
    adapted.merge_adapter()
    assert_equal([model(module=adapted).detach()], [changed])
    adapted.unmerge_adapter()
    module = adapted.unload()
    fastgen.restore(module)
    assert_equal([model(module=module).detach()], [before])


def test_dropout_of_attention_weights_is_applied_in_training():
    model = Model(case_of("", "vit_tiny_patch16_224", {**PLAIN, "attn_drop_rate": 0.5}, 2))
    if not torch.equal(model(), model()):
        pytest.skip("this version of timm applies dropout in eval mode")
    fastgen.accelerate(model.module)
    assert torch.equal(model(), model())
    model.module.train()
    assert not torch.equal(model(), model())


def test_an_unknown_forward_of_swin_v2_is_kept(monkeypatch):
    from fastgen.integrations import timm as integration

    monkeypatch.setattr(integration, "_KNOWN_SWIN_V2", ())
    report = fastgen.accelerate(swin_v2().module)
    assert not report.replaced
    assert len(report.kept) == 4
    assert all("differs from the versions that fastgen knows" in reason for reason in report.kept.values())


def test_a_model_on_the_meta_device_can_be_accelerated_and_loaded_later():
    model = vit()
    expected, state = model().detach(), model.module.state_dict()
    try:
        with torch.device("meta"):
            module = CASES[0].build().eval().double()
    except RuntimeError as error:
        pytest.skip(f"this version of timm does not build models on the meta device: {error}")
    fastgen.accelerate(module)
    assert module(model.x.to("meta")).shape == expected.shape
    module.to_empty(device="cpu")
    module.load_state_dict(state)
    assert_equal([model(module=module).detach()], [expected])


@pytest.mark.parametrize("after", [False, True])
def test_cpu_offload_of_the_package_accelerate(after):
    accelerate = pytest.importorskip("accelerate")
    model = Model(CASES[2])  # Swin: those with other buffers are wrong after cpu_offload, also without fastgen
    expected = model().detach()
    if after:
        fastgen.accelerate(model.module)
    accelerate.cpu_offload(model.module, execution_device=torch.device("cpu"))
    if not after:
        report = fastgen.accelerate(model.module)
        # The layer has parameters of its own, which a hook loads in a forward that it sets on the instance.
        assert set(report.kept.values()) == {"forward is overridden on the instance; accelerate before that"}
    with torch.no_grad():
        assert_equal([model()], [expected])
    if after:
        with pytest.raises(RuntimeError, match="to have the forward of its class"):
            fastgen.restore(model.module)
        accelerate.hooks.remove_hook_from_submodules(model.module)
    fastgen.restore(model.module)
    with torch.no_grad():
        assert_equal([model()], [expected])
