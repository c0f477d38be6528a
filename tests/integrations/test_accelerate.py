"""``accelerate`` and ``restore``."""

from __future__ import annotations

import copy
import doctest
import io
import pickle

import pytest
import torch
from torch import nn

import fastgen
from fastgen.integrations import modules
from fastgen.losses import r1_penalty


class Mixer(nn.Module):
    """A custom block."""

    def __init__(self, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])


class Model(nn.Module):
    """A custom model: (B, T) tokens or (B, T, width) embeddings -> (B, 1)."""

    def __init__(self, width=8):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True)
        self.embed = nn.Embedding(11, width)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.recurrent = nn.LSTM(width, width // 2, num_layers=2, bidirectional=True, batch_first=True)
        self.mixer = Mixer(width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.shared = self.gru
        self.old = nn.RNN(width, width, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, x):
        x = x if x.is_floating_point() else self.embed(x)
        x = self.mixer(self.recurrent(self.encoder(x))[0])
        return self.head(self.old(self.shared(self.gru(x)[0])[0])[0].mean(1))


LAYERS = {
    "encoder": "TransformerEncoder",
    "encoder.layers.0": "TransformerEncoderLayer",
    "encoder.layers.0.self_attn": "MultiheadAttention",
    "encoder.layers.1": "TransformerEncoderLayer",
    "encoder.layers.1.self_attn": "MultiheadAttention",
    "recurrent": "LSTM",
    "mixer.attention": "MultiheadAttention",
    "gru": "GRU",
    "shared": "GRU",
}


def tokens():
    return torch.randint(0, 11, (3, 5))


def snapshot(model):
    """State of a model that accelerate must preserve, by identity of the objects."""
    return {
        name: (type(part), {key: id(value) for key, value in vars(part).items()}, [id(p) for p in part.parameters()])
        for name, part in model.named_modules(remove_duplicate=False)
    }


def assert_states_equal(a, b):
    assert list(a) == list(b)
    assert all(torch.equal(a[key], b[key]) for key in a)


# --------------------------------------------------------------------------------------------------
# Equivalence to the original model


def test_outputs_and_state_dict_are_preserved():
    model, x = Model(), tokens()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for mode in (model.train, model.eval):
        mode()
        before, original = model(x), snapshot(model)
        fastgen.accelerate(model)
        torch.testing.assert_close(model(x), before)
        with torch.no_grad():
            torch.testing.assert_close(model(x), before)
        assert_states_equal(model.state_dict(), state)
        fastgen.restore(model)
        assert torch.equal(model(x), before)
        assert_states_equal(model.state_dict(), state)
        assert snapshot(model) == original


def test_gradients_are_preserved():
    model, x = Model().double(), tokens()

    def gradients():
        return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))

    before = gradients()
    fastgen.accelerate(model)
    for a, b in zip(gradients(), before, strict=True):
        torch.testing.assert_close(a, b)
    fastgen.restore(model)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), before, strict=True))


def test_report_lists_every_layer():
    model = Model()
    report = fastgen.accelerate(model)
    assert report.replaced == {name: f"torch.nn.{cls} -> fastgen.nn.{cls}" for name, cls in LAYERS.items()}
    assert report.kept == {"old": "torch.nn.RNN has no equivalent in fastgen.nn"}
    for name, cls in LAYERS.items():
        assert type(model.get_submodule(name)) is getattr(fastgen.nn, cls)
    back = fastgen.restore(model)
    assert back.replaced == {name: f"fastgen.nn.{cls} -> torch.nn.{cls}" for name, cls in LAYERS.items()}
    assert back.kept == {}
    for name, cls in LAYERS.items():
        assert type(model.get_submodule(name)) is getattr(nn, cls)


def test_every_drop_in_layer_of_fastgen_is_in_the_table():
    """A drop-in replacement added to fastgen.nn must be in the table."""
    same = {name for name in fastgen.nn.__all__ if issubclass(getattr(fastgen.nn, name), getattr(nn, name, ()))}
    assert same == set(modules._NAMES)


def test_nn_transformer_is_accelerated():
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True).double()
    source, target = torch.randn(2, 4, 8).double(), torch.randn(2, 3, 8).double()
    before = model(source, target)
    report = fastgen.accelerate(model)
    assert report.replaced["(model)"] == "torch.nn.Transformer -> fastgen.nn.Transformer"
    assert report.replaced["decoder.layers.0.multihead_attn"].endswith("fastgen.nn.MultiheadAttention")
    torch.testing.assert_close(model(source, target), before)
    fastgen.restore(model)
    assert torch.equal(model(source, target), before)


def test_r1_penalty_requires_acceleration():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    real = torch.randn(3, 5, 8, requires_grad=True)

    def penalty():
        out, _ = attention(real, real, real, need_weights=False)
        return r1_penalty(out.square().sum((1, 2)), real)

    def expected():
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            return torch.autograd.grad(penalty(), list(attention.parameters()), materialize_grads=True)

    reference = expected()
    with pytest.raises(RuntimeError, match="is not implemented"):
        penalty().backward()
    fastgen.accelerate(attention)
    results = torch.autograd.grad(penalty(), list(attention.parameters()), materialize_grads=True)
    for a, b in zip(results, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    fastgen.restore(attention)
    with pytest.raises(RuntimeError, match="is not implemented"):
        penalty().backward()


def test_r1_penalty_through_a_model():
    model = Model()
    fastgen.accelerate(model)
    real = torch.randn(3, 5, 8, requires_grad=True)
    r1_penalty(model(real), real).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.encoder.parameters() if p.grad is not None)
    assert bool(model.encoder.layers[0].self_attn.in_proj_weight.grad.any())


# --------------------------------------------------------------------------------------------------
# State of the model


def test_parameters_optimizers_hooks_and_flags_are_preserved():
    model, x = Model(), tokens()
    model.gru.requires_grad_(False)
    model.recurrent.eval()
    parameters, calls = list(model.parameters()), []
    model.recurrent.register_forward_hook(lambda *_: calls.append("forward"))
    model.mixer.attention.register_full_backward_hook(lambda *_: calls.append("backward"))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

    def step():
        calls.clear()
        before = [p.detach().clone() for p in parameters]
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        assert calls == ["forward", "backward"]
        moved = [not torch.equal(a, b) for a, b in zip(parameters, before, strict=True)]
        frozen = {id(p) for p in model.gru.parameters()}
        assert all(
            move or id(p) in frozen or p is model.embed.weight for move, p in zip(moved, parameters, strict=True)
        )
        return moved

    first = step()
    fastgen.accelerate(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not model.recurrent.training
    assert not model.gru.weight_hh_l0.requires_grad
    assert step() == first
    fastgen.restore(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert step() == first
    assert all(int(state["step"]) == 3 for state in optimizer.state.values())


def test_training_steps_match_torch():
    torch.manual_seed(1)
    plain = Model().double()
    ours, x, losses = copy.deepcopy(plain), tokens(), []
    fastgen.accelerate(ours)
    for model in (plain, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_of_accelerated_models_can_be_restored(copied):
    model, x = Model().eval(), tokens()
    before = model(x)
    fastgen.accelerate(model)
    other = copied(model)
    assert type(other.recurrent) is fastgen.nn.LSTM
    torch.testing.assert_close(other(x), before)
    assert set(fastgen.restore(other).replaced) == set(LAYERS)
    assert torch.equal(other(x), before)
    assert type(model.recurrent) is fastgen.nn.LSTM
    assert set(vars(other.recurrent)) == set(vars(Model().recurrent))


def test_state_dicts_are_interchangeable():
    model, accelerated = Model(), Model()
    fastgen.accelerate(accelerated)
    assert not any(accelerated.load_state_dict(model.state_dict()))
    x = tokens()
    torch.testing.assert_close(accelerated.eval()(x), model.eval()(x))
    assert not any(Model().load_state_dict(accelerated.state_dict()))


# --------------------------------------------------------------------------------------------------
# Repeated, partial and empty calls


def test_accelerate_is_idempotent():
    model = Model()
    first, second = fastgen.accelerate(model), fastgen.accelerate(model)
    assert second.replaced == {}
    assert second.kept == {
        **{name: f"already accelerated: fastgen.nn.{cls}" for name, cls in LAYERS.items()},
        **first.kept,
    }
    assert set(fastgen.restore(model).replaced) == set(LAYERS)
    assert fastgen.restore(model) == fastgen.AccelerationReport({}, {})
    assert type(model.recurrent) is nn.LSTM


def test_layers_constructed_as_fastgen_layers_are_not_restored():
    model = nn.ModuleList([fastgen.nn.GRU(2, 2), nn.GRU(2, 2)])
    report = fastgen.accelerate(model)
    assert report.replaced == {"1": "torch.nn.GRU -> fastgen.nn.GRU"}
    assert report.kept == {"0": "constructed as fastgen.nn.GRU"}
    fastgen.restore(model)
    assert [type(part) for part in model] == [fastgen.nn.GRU, nn.GRU]


def test_restore_of_a_submodule():
    model = Model()
    fastgen.accelerate(model)
    assert set(fastgen.restore(model.mixer).replaced) == {"attention"}
    assert type(model.mixer.attention) is nn.MultiheadAttention
    assert type(model.recurrent) is fastgen.nn.LSTM


def test_model_without_replaceable_layers():
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1))
    report = fastgen.accelerate(model)
    assert report == fastgen.AccelerationReport({}, {})
    assert str(report) == "replaced: none\nkept: none"


def test_report_formatting():
    report = fastgen.accelerate(nn.ModuleDict({"a": nn.LSTM(2, 2), "longer": nn.GRU(2, 2), "c": nn.RNNCell(2, 2)}))
    assert str(report).splitlines() == [
        "replaced: 2",
        "  a       torch.nn.LSTM -> fastgen.nn.LSTM",
        "  longer  torch.nn.GRU -> fastgen.nn.GRU",
        "kept: 1",
        "  c  torch.nn.RNNCell has no equivalent in fastgen.nn",
    ]
    assert eval(repr(report), {"AccelerationReport": fastgen.AccelerationReport}) == report
    with pytest.raises(AttributeError):
        report.replaced = {}


@pytest.mark.parametrize("function", [fastgen.accelerate, fastgen.restore])
@pytest.mark.parametrize("model", [None, nn.LSTM, [nn.LSTM(2, 2)], torch.zeros(2)], ids=lambda m: type(m).__name__)
def test_non_modules_raise(function, model):
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got"):
        function(model)


def test_docstring_examples():
    assert doctest.testmod(fastgen.integrations) == (0, 8)


# --------------------------------------------------------------------------------------------------
# Wrappers


def test_data_parallel_modules_are_accelerated():
    model = nn.DataParallel(Mixer(4))
    x = torch.randn(2, 3, 4)
    before = model(x)
    assert set(fastgen.accelerate(model).replaced) == {"module.attention"}
    torch.testing.assert_close(model(x), before)
    fastgen.restore(model)
    assert torch.equal(model(x), before)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_modules_are_accelerated(one_process):
    model, x = nn.parallel.DistributedDataParallel(Mixer(4)), torch.randn(2, 3, 4)
    before = model(x)
    assert set(fastgen.accelerate(model).replaced) == {"module.attention"}
    torch.testing.assert_close(model(x), before)
    model(x).square().sum().backward()
    fastgen.restore(model)
    assert torch.equal(model(x), before)


def test_sharded_layers_are_kept(one_process):
    model = nn.ModuleList([nn.LSTM(4, 4), nn.GRU(4, 4)])
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.fsdp.fully_shard(model[0], mesh=mesh)
    report = fastgen.accelerate(model)
    assert set(report.replaced) == {"1"}
    assert report.kept == {"0": "FSDP changed the class of this torch.nn.LSTM to FSDPLSTM; accelerate before that"}


@pytest.mark.parametrize("how", ["function", "method"])
def test_compiled_models_are_recompiled(how):
    torch._dynamo.reset()
    module = Mixer(4)
    model = torch.compile(module, backend="eager") if how == "function" else module
    if how == "method":
        module.compile(backend="eager")
    x, calls = torch.randn(2, 3, 4), []
    before = model(x)
    report = fastgen.accelerate(model)
    ((name, text),) = report.replaced.items()
    assert name == ("_orig_mod.attention" if how == "function" else "attention")
    assert text == "torch.nn.MultiheadAttention -> fastgen.nn.MultiheadAttention, recompiled at its next call"
    attend = fastgen.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fastgen.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or attend(*a, **k)
        )
        torch.testing.assert_close(model(x), before)
    assert calls
    fastgen.restore(model)
    torch.testing.assert_close(model(x), before)
