"""``__torch_function__``: tensor subclasses and modes receive one call of each public function."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode

import fastgen
from fastgen import functional, nn
from tests.tracing.calls import FUNCTIONS, tensors_of


class Recorded(torch.Tensor):
    """A subclass that names the functions it is given to, and computes what torch.Tensor does."""

    calls: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


class Recording(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls.append(function)
        return function(*args, **(kwargs or {}))


class Answered(torch.Tensor):
    """A subclass that computes nothing."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function.__name__, types, kwargs


def made(name, cls=None, at=None):
    """The result of a small call, with its ``at``-th tensor, or each, as an instance of ``cls``."""
    generator, count = torch.Generator().manual_seed(0), iter(range(99))

    def make(*sizes, dtype=None, grad=True):
        tensor = torch.rand(sizes, generator=generator)
        own = cls is not None and (at is None or next(count) == at)
        return tensor.as_subclass(cls) if own else tensor

    torch.manual_seed(0)
    return FUNCTIONS[name](make)


def count_of_tensors(name):
    made_tensors = []
    FUNCTIONS[name](lambda *sizes, dtype=None, grad=True: made_tensors.append(1) or torch.rand(sizes))
    return len(made_tensors)


EACH = [(name, at) for name in FUNCTIONS for at in range(count_of_tensors(name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_subclass_receives_one_call_of_the_public_function(name):
    expected = tensors_of(made(name))
    Recorded.calls.clear()
    results = tensors_of(made(name, Recorded))
    assert Recorded.calls == [getattr(functional, name)]
    assert all(type(result) is Recorded for result in results)
    for result, tensor in zip(results, expected, strict=True):
        assert torch.equal(result.as_subclass(torch.Tensor), tensor)


@pytest.mark.parametrize(("name", "at"), EACH)
def test_each_argument_is_asked(name, at):
    called, types, options = made(name, Answered, at)
    assert called == name
    assert Answered in types
    assert not set(options) & {"query", "x", "mu"}  # positional, as given


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mode_receives_one_call_of_the_public_function(name):
    expected = tensors_of(made(name))
    with Recording() as mode:
        results = tensors_of(made(name))
    own = [function for function in mode.calls if function.__module__.startswith("fastgen")]
    assert own == [getattr(functional, name)]
    seen = {getattr(function, "__name__", "") for function in mode.calls}
    assert seen <= {name, "rand", "manual_seed", "default_generator"} | {"<lambda>"}, seen
    for result, tensor in zip(results, expected, strict=True):
        assert torch.equal(result, tensor)


def test_arguments_reach_the_override_as_they_were_given():
    q = torch.rand(1, 2, 3, 4).as_subclass(Answered)
    generator = torch.Generator()
    options = {"window": (1, 0), "generator": generator, "return_lse": True}
    _, _, got = functional.scaled_dot_product_attention(q, q, q, None, 0.5, True, 0.3, True, **options)
    assert got == options | {"softcap": None, "sinks": None}
    _, _, got = functional.qkv_projection(q, q, heads=(1, 2), head_dims=(2, 1), norm_eps=0.1, rotated=1)
    assert (got["heads"], got["head_dims"], got["norm_eps"], got["rotated"]) == ((1, 2), (2, 1), 0.1, 1)


def test_a_subclass_may_refuse():
    class Refusing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return NotImplemented

    q = torch.rand(1, 2, 3, 4)
    with pytest.raises(TypeError, match=r"scaled_dot_product_attention.*Refusing"):
        functional.scaled_dot_product_attention(q, q.as_subclass(Refusing), q)


def test_gradients_of_subclasses_are_those_of_tensors():
    q = torch.rand(1, 2, 3, 4, dtype=torch.float64)

    def gradients(leaf):
        (first,) = torch.autograd.grad(
            functional.scaled_dot_product_attention(leaf, leaf, leaf).square().sum(), leaf, create_graph=True
        )
        return [first, *torch.autograd.grad(first.square().sum(), leaf)]

    expected = gradients(q.clone().requires_grad_())
    for a, b in zip(gradients(q.as_subclass(Recorded).requires_grad_()), expected, strict=True):
        torch.testing.assert_close(a.as_subclass(torch.Tensor), b)


def test_layers_show_their_public_functions():
    layer = nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True)
    x = torch.rand(2, 3, 8)
    expected = layer(x)
    Recorded.calls.clear()
    result = layer(x.as_subclass(Recorded))
    torch.testing.assert_close(result.as_subclass(torch.Tensor), expected)
    own = [function for function in Recorded.calls if getattr(function, "__module__", "").startswith("fastgen")]
    assert own == [
        functional.qkv_projection, functional.scaled_dot_product_attention, functional.merge_heads_projection
    ]  # fmt: skip
    assert not [
        function for function in Recorded.calls if "fastgen" in str(getattr(function, "_qualified_op_name", ""))
    ]


@pytest.mark.parametrize("layer", [nn.LSTM(3, 4), nn.GRU(3, 4)], ids=lambda layer: type(layer).__name__)
def test_recurrent_layers_take_subclasses(layer):
    x = torch.rand(5, 2, 3)
    torch.testing.assert_close(layer(x.as_subclass(Recorded))[0].as_subclass(torch.Tensor), layer(x)[0])


def test_functions_are_recorded_by_fx():
    class Net(torch.nn.Module):
        def forward(self, q, x, weight):
            (heads,) = functional.qkv_projection(x, weight, heads=(2,), head_dims=(4,))
            return functional.scaled_dot_product_attention(q, heads, heads, is_causal=True)

    graph = torch.fx.symbolic_trace(Net())
    assert functional.scaled_dot_product_attention in {node.target for node in graph.graph.nodes}
    inputs = torch.rand(2, 2, 3, 4), torch.rand(2, 3, 5), torch.rand(8, 5)
    assert torch.equal(graph(*inputs), Net()(*inputs))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("around", [True, False], ids=["mode around the compiled call", "compiled with the mode"])
def test_a_default_device_does_not_break_a_graph(name, around):
    torch._dynamo.reset()
    run = torch.compile(
        lambda: FUNCTIONS[name](lambda *s, dtype=None, grad=True: torch.ones(s)), backend="eager", fullgraph=True
    )
    if around:
        with torch.device("cpu"):
            run()
    else:
        run()
        torch.set_default_device("cpu")
        try:
            run()
        finally:
            torch.set_default_device(None)


def test_compiled_calls_take_subclasses_in_one_graph():
    """The tracer shows them what the function calls, instead of the function."""

    class Passing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return super().__torch_function__(function, types, args, kwargs or {})

    torch._dynamo.reset()
    q = torch.rand(1, 2, 3, 4)
    run = torch.compile(lambda x: functional.scaled_dot_product_attention(x, x, x), backend="eager", fullgraph=True)
    assert torch.equal(run(q.as_subclass(Passing)).as_subclass(torch.Tensor), run(q))


def test_a_default_device_is_that_of_factories_only():
    """A mode that is active in most calls of some programs."""
    x = torch.rand(2, 8)
    with torch.device("meta"):
        z = functional.reparameterize(x, x)
        out = functional.scaled_dot_product_attention(x, x, x, torch.ones(2, 2, device="cpu"), 0.5)
    assert z.device.type == out.device.type == "cpu"


def test_results_do_not_depend_on_the_backend_of_the_override():
    q = torch.rand(1, 2, 3, 4)
    for backend in ("torch", "auto"):
        with fastgen.use_backend(backend):
            Recorded.calls.clear()
            functional.scaled_dot_product_attention(q.as_subclass(Recorded), q, q)
            assert Recorded.calls == [functional.scaled_dot_product_attention]
