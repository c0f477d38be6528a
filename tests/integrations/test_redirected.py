"""Redirection of attention calls in modules of any library."""

from __future__ import annotations

import copy
import doctest
import functools
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fastgen
from fastgen import functional
from fastgen.integrations import _function_mode as mode
from fastgen.integrations import redirect_attention, redirected
from fastgen.integrations._calls import fingerprint, names_used


def attend(query, key, value, **options):
    return F.scaled_dot_product_attention(query, key, value, **options)


class Attend(nn.Module):
    """As in x-transformers and other libraries of its author: attention without parameters, in a module of its own."""

    def forward(self, query, key, value, causal=False):
        return attend(query, key, value, is_causal=causal)


class Attention(nn.Module):
    def __init__(self, width=8, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.attend = Attend()

    def forward(self, x, causal=False):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(query, key, value, causal=causal).transpose(1, 2).flatten(2)


class WithSoftmaxAttention(nn.Module):
    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x


class WithSoftmaxLayerAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.Softmax(-1)

    def forward(self, x):
        return self.attend(x @ x.mT) @ x


class Pool(nn.Module):
    def forward(self, x, weight, bias):
        return F.multi_head_attention_forward(
            x, x, x, x.size(-1), 2, weight, bias, None, None, False, 0.0, weight, bias
        )


class Repeating(nn.Module):
    """A part of the forward pass is repeated in the backward pass, outside of it."""

    def forward(self, x):
        return checkpoint(attend, x, x, x, use_reentrant=False)


class ByOtherMeans(Attend):
    """With a way of its own of being pickled."""

    def __reduce__(self):
        return ByOtherMeans, ()


def inputs(requires_grad=True):
    torch.manual_seed(0)
    return torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=requires_grad)


def model():
    torch.manual_seed(1)
    return nn.Sequential(Attention(), Attention()).double()


def penalty(module, x):
    (gradient,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    return gradient.square().sum()


def test_examples():
    assert doctest.testmod(redirected).failed == 0


# --------------------------------------------------------------------------------------------------
# What is redirected


def test_a_gradient_penalty_requires_redirection():
    module, x = model(), inputs()
    before = module(x).detach()
    with pytest.raises(RuntimeError, match="is not implemented"):
        penalty(module, x).backward()
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        expected = torch.autograd.grad(penalty(module, x), list(module.parameters()), materialize_grads=True)
    report = redirect_attention(module, Attend)
    text = f"{__name__}.Attend calls fastgen's attention"
    assert report.replaced == {"0.attend": text, "1.attend": text}
    assert report.kept == {}
    assert isinstance(module[0].attend, Attend)
    torch.testing.assert_close(module(x).detach(), before)
    actual = torch.autograd.grad(penalty(module, x), list(module.parameters()), materialize_grads=True)
    torch.testing.assert_close(actual, expected)
    back = fastgen.restore(module)
    assert back.replaced.keys() == report.replaced.keys()
    assert type(module[0].attend) is Attend
    assert torch.equal(module(x), before)
    with pytest.raises(RuntimeError, match="is not implemented"):
        penalty(module, x).backward()


def test_both_jvps_match():
    module, x = model(), inputs(requires_grad=False)
    direction = torch.randn_like(x)
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(module, (x,), (direction,))
    redirect_attention(module, Attend)
    out, tangent = torch.func.jvp(module, (x,), (direction,))
    again, expected = torch.autograd.functional.jvp(module, x, direction, create_graph=True)
    torch.testing.assert_close(out, again)
    torch.testing.assert_close(tangent, expected)


def test_accelerate_names_the_modules_it_leaves():
    module = nn.ModuleDict(
        {
            "own": Attend(),
            "softmax": WithSoftmaxAttention(),
            "layer": WithSoftmaxLayerAttention(),
            "pool": Pool(),
            "other": nn.Linear(2, 2),
            "inside": Attention(),
            "torch": nn.MultiheadAttention(8, 2),
        }
    )
    call = (
        f"{__name__}.Attend calls torch's scaled_dot_product_attention;"
        " fastgen.integrations.redirect_attention(model, Attend) replaces it"
    )
    report = fastgen.accelerate(module)
    assert report.kept == {
        "own": call,
        "softmax": f"{__name__}.WithSoftmaxAttention computes the softmax itself",
        "layer": f"{__name__}.WithSoftmaxLayerAttention computes the softmax itself",
        "pool": f"{__name__}.Pool calls multi_head_attention_forward",
        "inside.attend": call,
    }
    assert list(report.replaced) == ["torch"]
    redirect_attention(module, Attend)
    report = fastgen.accelerate(module)
    assert report.kept["own"] == f"already accelerated: {__name__}.Attend"


def test_modules_that_cannot_be_redirected_are_named():
    patched = Attend()
    patched.forward = functools.partial(Attend.forward, patched)
    parametrized = Attention()
    parametrized.attend.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    parametrize.register_parametrization(parametrized.attend, "unused", nn.Identity())
    module = nn.ModuleList([patched, Repeating(), parametrized.attend, WithSoftmaxAttention()])
    report = redirect_attention(module, Attend, Repeating, WithSoftmaxAttention)
    assert report.replaced == {}
    assert report.kept == {
        "0": "forward is overridden on the instance; accelerate before that",
        "1": f"{__name__}.Repeating repeats a part of its forward pass (activation checkpointing)",
        "2": "a parametrization changed the class of this module to ParametrizedAttend; accelerate before that",
        "3": f"{__name__}.WithSoftmaxAttention computes the softmax itself",
    }


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module"):
        redirect_attention(Attend)
    for classes in ((), (Attend(),), (int,)):
        with pytest.raises(TypeError, match=r"^classes: expected one or more subclasses of torch.nn.Module"):
            redirect_attention(Attend(), *classes)
    report = redirect_attention(nn.Linear(2, 2), nn.Linear)
    reason = "no call of scaled_dot_product_attention in the code of torch.nn.Linear"
    assert report.kept == {"(model)": reason}


def test_a_shared_module_is_named_twice_and_restored_once():
    shared = Attend()
    module = nn.ModuleList([shared, shared])
    assert list(redirect_attention(module, Attend).replaced) == ["0", "1"]
    assert list(fastgen.restore(module).replaced) == ["0", "1"]
    assert type(shared) is Attend


def test_names_are_found_through_calls():
    assert "scaled_dot_product_attention" in names_used(Attend)
    assert "scaled_dot_product_attention" not in names_used(Attention)  # its submodule calls it


def test_fingerprints_ignore_comments_and_annotations():
    class First:
        def forward(self, x: int) -> int:
            """Doc."""
            return x + 1  # comment

    class Second:
        def forward(self, x):
            return x + 1

    class Third:
        def forward(self, x):
            return x + 2

    prints = [fingerprint(cls.forward) for cls in (First, Second, Third)]
    assert prints[0] == prints[1] != prints[2]
    assert fingerprint(len) == ""


# --------------------------------------------------------------------------------------------------
# What is not affected


@pytest.fixture
def calls(monkeypatch):
    """Numbers of queries of the calls of fastgen's function."""
    found = []
    original = functional.scaled_dot_product_attention

    def count(query, *args, **kwargs):
        found.append(query.size(-2))
        return original(query, *args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", count)
    return found


def test_calls_outside_of_the_module_are_unaffected(calls):
    module, x = Attend(), inputs()
    redirect_attention(module, Attend)
    attend(x, x, x)
    Attend()(x, x, x)
    assert not calls
    module(x, x, x)
    assert calls == [5]
    with pytest.raises(ValueError, match="head dim"):
        module(x, x[..., :4], x)
    attend(x, x, x)
    assert len(calls) == 2


def test_other_threads_are_unaffected(calls):
    module, x = Attend(), inputs()
    redirect_attention(module, Attend)
    threads = [threading.Thread(target=target, args=(x, x, x)) for target in (attend, module)]
    for thread in threads:
        thread.start()
        thread.join()
    assert calls == [5]


def test_nested_tensors_go_to_torch(calls):
    module = Attend()
    query = torch.nested.nested_tensor([torch.randn(3, 2, 4), torch.randn(5, 2, 4)], layout=torch.jagged)
    query = query.transpose(1, 2)
    before = module(query, query, query)
    redirect_attention(module, Attend)
    after = module(query, query, query)
    assert not calls
    torch.testing.assert_close(after.values(), before.values())


def test_traced_by_fx():
    module = Attend()
    redirect_attention(module, Attend)
    graph = torch.fx.symbolic_trace(module, concrete_args={"causal": False})
    assert F.scaled_dot_product_attention in {node.target for node in graph.graph.nodes}


# --------------------------------------------------------------------------------------------------
# Checkpointing, compilation, hooks


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant, calls):
    module, x = model(), inputs()
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    redirect_attention(module, Attend)
    out = x
    for part in module:
        out = checkpoint(part, out, use_reentrant=use_reentrant)
    if use_reentrant:
        out.square().sum().backward()
        actual = x.grad
    else:
        (actual,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(actual, expected)
    assert len(calls) == 4  # each layer twice


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_under_compile(backend):
    module, x = model(), inputs()
    before = module(x)
    (gradient,) = torch.autograd.grad(before.square().sum(), x)
    redirect_attention(module, Attend)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    after = compiled(x)
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(torch.autograd.grad(after.square().sum(), x)[0], gradient)
    if backend == "eager":
        actual = torch.autograd.grad(penalty(compiled, x), list(module.parameters()), materialize_grads=True)
        expected = torch.autograd.grad(penalty(module, x), list(module.parameters()), materialize_grads=True)
        torch.testing.assert_close(actual, expected)


def test_tensor_methods_written_in_python_compile():
    """Dynamo cannot trace those that call super() when a function mode passes them on."""

    class Methods(nn.Module):
        def forward(self, x):
            first, second = x.unflatten(-1, (2, 4)).transpose(1, 2).split([1, 1], 1)
            x = torch.cat([first, second], 1) / x.norm()
            x = torch.einsum("bhnd,de->bhne", x, torch.eye(4, dtype=x.dtype))
            return F.scaled_dot_product_attention(x, x, x).sum(1)

    module, x = Methods(), inputs()
    expected = module(x)
    redirect_attention(module, Methods)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)


def test_hooks_run_once():
    module, x = Attend(), inputs()
    seen = []
    module.register_forward_hook(lambda *_: seen.append("forward"))
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    redirect_attention(module, Attend)
    module(x, x, x).sum().backward()
    assert seen == ["forward", "backward"]


# --------------------------------------------------------------------------------------------------
# Copies, pickles, restore


def test_copies_are_redirected_and_can_be_restored(calls):
    module, x = model(), inputs()
    redirect_attention(module, Attend)
    module.note = "kept"
    others = [copy.copy(module[0].attend), copy.deepcopy(module)]
    others += [pickle.loads(pickle.dumps(module, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in others:
        assert isinstance(other, Attend) or other.note == "kept"
        attention = other if isinstance(other, Attend) else other[0].attend
        assert type(attention) is type(module[0].attend)
        calls.clear()
        attention(x, x, x)
        assert calls
        fastgen.restore(other)
        assert type(attention) is Attend
    assert mode.is_redirected(module[0].attend)


def test_a_class_with_its_own_pickling_is_refused():
    module = ByOtherMeans()
    pickle.dumps(module)
    redirect_attention(module, ByOtherMeans)
    with pytest.raises(pickle.PicklingError, match=r"ByOtherMeans: expected .*call fastgen.restore first"):
        pickle.dumps(module)
    fastgen.restore(module)
    pickle.dumps(module)


def test_restore_refuses_what_it_would_not_undo():
    module = model()
    fastgen.accelerate(module)
    redirect_attention(module, Attend)
    own, forward = module[1].attend, module[1].attend.forward
    own.forward = lambda *args: forward(*args)
    with pytest.raises(RuntimeError, match=r"expected 1.attend to have the forward of its class"):
        fastgen.restore(module)
    assert mode.is_redirected(module[0].attend)
    del own.forward
    own.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    parametrize.register_parametrization(own, "unused", nn.Identity())
    with pytest.raises(RuntimeError, match=r"expected 1.attend to have the class that accelerate gave it"):
        fastgen.restore(module)
    parametrize.remove_parametrizations(own, "unused")
    own.forward = own.forward  # as removed hooks of the package accelerate leave it
    fastgen.restore(module)
    assert "forward" not in vars(own)
    assert not any(mode.is_redirected(part) for part in module.modules())
