"""A row of the table of derivatives: arguments that are one tensor, or computed from one another.

The gradient of such an argument has a part for each way by which it reaches the result. What counts a way twice, or
leaves one out, is found here: against the same thing in plain PyTorch, in float64.
"""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

import fastgen
from fastgen import functional, nn, reference
from fastgen.ops.recurrent import autograd as implementation
from tests.ops.derivative_cases import CASES, PENALTIES, normal, plain_recurrent, scalar
from tests.ops.derivative_ways import WAYS
from tests.ops.test_derivatives import refusal

B, N, D = 2, 3, 4


def reverse(f, x, d):
    leaves = [t.clone().requires_grad_() for t in x]
    return torch.autograd.grad(f(*leaves), leaves)


def reverse_create_graph(f, x, d):
    leaves = [t.clone().requires_grad_() for t in x]
    return [t.detach() for t in torch.autograd.grad(f(*leaves), leaves, create_graph=True)]


def reverse_batched(f, x, d):
    """The first of two gradients that PyTorch computes at once, inside a vmap."""
    leaves = [t.clone().requires_grad_() for t in x]
    value = f(*leaves)
    return [t[0] for t in torch.autograd.grad(value, leaves, torch.eye(2)[0].to(value), is_grads_batched=True)]


ONCE = {"reverse": reverse, "reverse with create_graph": reverse_create_graph, "batched reverse": reverse_batched}
TWICE = (
    "forward",
    "dual numbers over reverse",
    "double backward",
    "double backward with checkpoints",
    "torch.func.grad of grad",
    "forward over reverse",
    "reverse over forward",
    "vmap of grad of grad",
    "compiled without AOTAutograd",
)
ALL = {**{name: (way, reverse) for name, way in ONCE.items()}, **{name: WAYS[name] for name in TWICE}}


def one_from_another(function):
    """Each argument is computed from the one before it, as the function is given that."""

    def call(*tensors):
        given = []
        for tensor in tensors:
            given.append(tensor + given[-1].mean().sin() if given else tensor)
        return function(*given)

    return call


def one_for_all(function, shapes):
    """The arguments of one shape are one tensor; called with one of each shape."""
    distinct = list(dict.fromkeys(shapes))

    def call(*tensors):
        return function(*(tensors[distinct.index(shape)] for shape in shapes))

    return call


def assert_right(way, ours, plain, x, refused=None, **tolerances):
    d = [torch.randn_like(t) for t in x]
    take, oracle = ALL[way]
    wanted = oracle(scalar(plain), [t.double() for t in x], [t.double() for t in d])
    assert any(bool((t != 0).any()) for t in wanted), "an oracle of zeros shows nothing"
    if refused:
        with pytest.raises(Exception, match=refused):
            take(scalar(ours), x, d)
        return
    torch._dynamo.reset()
    for a, b in zip(take(scalar(ours), x, d), wanted, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, **{"rtol": 1e-6, "atol": 1e-8, **tolerances})


QUICK = (*ONCE, "forward", "double backward", "forward over reverse", "vmap of grad of grad")


def cells(names):
    return [
        pytest.param(name, way, id=f"{name}-{way}", marks=[] if way in QUICK else [pytest.mark.slow])
        for name in names
        for way in ALL
    ]


SEVERAL = [
    name for name in CASES if name not in (*PENALTIES, "ConvVAE", "DCGAN", "TransformerLM", "KVCache", "GaussianLatent")
]
"""Those of several arguments; a penalty's are detached, and a cache is written in place."""


@pytest.mark.parametrize(("name", "way"), cells(SEVERAL))
def test_arguments_computed_from_one_another(name, way):
    torch.manual_seed(2)
    ours, plain, x = CASES[name]()
    refused = None if way in ONCE else refusal(name, way)
    assert_right(way, one_from_another(ours), one_from_another(plain), x, refused)


def repeated(name):
    torch.manual_seed(2)
    shapes = [t.shape for t in CASES[name]()[2]]
    return len(set(shapes)) < len(shapes)


@pytest.mark.parametrize(("name", "way"), cells([name for name in SEVERAL if repeated(name)]))
def test_one_tensor_for_several_arguments(name, way):
    torch.manual_seed(2)
    ours, plain, x = CASES[name]()
    shapes = [t.shape for t in x]
    distinct = [x[shapes.index(shape)] for shape in dict.fromkeys(shapes)]
    refused = None if way in ONCE else refusal(name, way)
    assert_right(way, one_for_all(ours, shapes), one_for_all(plain, shapes), distinct, refused)


# --------------------------------------------------------------------------------------------------
# Projections: the norm of q and k scales x too, one weight serves three products, x is the residual and makes the gate


def network(project, merge, first):
    def call(x, weight, norm):
        x = x * (1 + weight.mean())
        scale = norm.repeat(2)[:, None] if first else norm.repeat(2)
        for rotated in (TABLES, tuple(t * norm.sum() for t in TABLES)):
            q, k, v = project(x * scale, weight, norm, rotated)
            x = merge(q * k.sigmoid() + v, weight[:D], norm.repeat(2), x, x.mean(2 if first else 1))
        return x

    return call


TABLES = (torch.arange(N).double()[:, None].cos(), torch.arange(N).double()[:, None].sin())


def our_network(first):
    def project(x, weight, norm, rotary):
        options = {"heads": (2, 2, 2), "head_dims": (2, 2, 2), "norms": (norm, norm), "rotary": rotary}
        return functional.qkv_projection(x, weight, channels_first=first, **options)

    def merge(x, weight, bias, residual, gate):
        options = {"residual": residual, "gate": gate, "channels_first": first}
        return functional.merge_heads_projection(x, weight, bias, **options)

    return network(project, merge, first)


def plain_network(first):
    def project(x, weight, norm, rotary):
        epilogue = ((norm, norm), 1e-6, rotary[0][None], rotary[1][None], 2)
        return reference.projection(x, weight, None, [2, 2, 2], [2, 2, 2], first, *epilogue)

    def merge(x, weight, bias, residual, gate):
        return reference.merge_heads(x, weight, bias, residual, gate[:, None], first)

    return network(project, merge, first)


SERVED = {
    # by which autograd functions: backend, feature maps, dtype
    "PyTorch": ("auto", False, torch.float64),
    "operators": ("torch", True, torch.float64),
    "the CPU's helper": ("auto", False, torch.float32),
    "operators and the CPU's helper": ("auto", True, torch.float32),
}


@pytest.mark.parametrize("way", [way for way in ALL if "compiled" not in way])
@pytest.mark.parametrize("served", SERVED)
def test_projections_that_share_a_weight_and_a_norm(served, way):
    torch.manual_seed(2)
    backend, first, dtype = SERVED[served]
    x = [normal(*((B, D, N) if first else (B, N, D))), normal(3 * D, D) / 2, 1 + normal(2) / 3]
    tolerances = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {}
    with fastgen.use_backend(backend):
        assert_right(way, our_network(first), plain_network(first), [t.to(dtype) for t in x], **tolerances)


# --------------------------------------------------------------------------------------------------
# Recurrent layers: both layers have one set of weights, from which the input is computed; h and c are one tensor


@pytest.mark.parametrize("way", [way for way in ALL if "compiled" not in way])
@pytest.mark.parametrize("as_on_a_gpu", [False, True], ids=["on a CPU", "as on a GPU"])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_recurrent_layers_that_share_weights_and_states(monkeypatch, name, as_on_a_gpu, way):
    torch.manual_seed(2)
    monkeypatch.setattr(implementation, "accelerated", lambda device: as_on_a_gpu)
    layer = getattr(nn, name)(D, D, num_layers=2).double()
    names = [key for key, _ in layer.named_parameters() if key.endswith("0")]

    def computed(x, w_ih):
        return x * w_ih.mean(), x.mean(0)

    def ours(x, *weights):
        x, start = computed(x, weights[0])
        shared = {key[:-1] + index: t for key, t in zip(names, weights, strict=True) for index in "01"}
        states = start.expand(2, B, D)
        output, last = functional_call(layer, shared, (x, (states, states) if name == "LSTM" else states))
        return (output, *last) if name == "LSTM" else (output, last)

    def plain(x, *weights):
        x, start = computed(x, weights[0])
        below = plain_recurrent(x, *weights, start=start)
        above = plain_recurrent(below[0], *weights, start=start)
        return above[0], *(torch.stack(pair) for pair in zip(below[1:], above[1:], strict=True))

    assert_right(way, ours, plain, [normal(N, B, D), *(layer.get_parameter(key).detach() for key in names)])
