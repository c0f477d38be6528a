"""Recurrent layers beside torch's, and a simulated cuDNN, for tests of recurrent layers."""

from __future__ import annotations

import itertools

import torch
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import PackedSequence

from fastgen import nn
from fastgen.ops.recurrent import autograd as implementation

T, B, C, H = 4, 3, 3, 5
BOTH = ["LSTM", "GRU"]
OPTIONS = [
    {"num_layers": layers, "bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    for layers, bias, batch_first, bidirectional in itertools.product((1, 2), *[(True, False)] * 3)
]
GRID = [(name, options, given) for name in BOTH for options in OPTIONS for given in {False, options["num_layers"] == 2}]
GRID += [("LSTM", {**options, "proj_size": 2}, options["num_layers"] == 2) for options in OPTIONS]


class _SimulatedCudnn(torch.autograd.Function):
    """Has cuDNN's restrictions: one backward pass, in training mode only, all inputs cast under autocast."""

    @staticmethod
    def forward(ctx, stack, batch_sizes, train, *tensors):
        low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            ctx.leaves = [t.detach().requires_grad_() for t in tensors]
            lowered = [t if low is None else t.to(low) for t in ctx.leaves]
            arguments = implementation._arguments(stack, batch_sizes, lowered)
            ctx.results = ORIGINAL["torch_recurrence"](stack, *arguments, 0.0, train)
        ctx.train = train
        ctx.save_for_backward(*tensors)
        return tuple(result.detach() for result in ctx.results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        if not ctx.train:
            raise RuntimeError("cudnn RNN backward can only be called in training mode")
        if ctx.saved_tensors:
            CALLS.append("backward")
        gradients = torch.autograd.grad(ctx.results, ctx.leaves, grads, retain_graph=True, materialize_grads=True)
        return None, None, None, *gradients


def _simulated_cudnn(stack, data, batch_sizes, states, weights, probability=0.0, train=True):
    CALLS.append("forward")
    if torch.is_grad_enabled():
        assert not (probability and train), "the dropout mask would be lost"
    return _SimulatedCudnn.apply(stack, batch_sizes, train, data, *states, *weights)


ORIGINAL = {"torch_recurrence": implementation.torch_recurrence}
CALLS: list[str] = []


def simulate_cudnn(monkeypatch):
    CALLS.clear()
    monkeypatch.setattr(implementation, "accelerated", lambda device: True)
    monkeypatch.setattr("fastgen.functional.recurrent.accelerated", lambda device: True)
    monkeypatch.setattr(implementation, "torch_recurrence", _simulated_cudnn)


def normal(*shape, device="cpu"):
    return torch.randn(*shape, dtype=torch.float64, device=device)


def pair(name, device="cpu", dtype=torch.float64, **options):
    """torch's and fastgen's layer with the same state dict."""
    theirs = getattr(torch.nn, name)(C, H, **options).to(device, dtype)
    ours = getattr(nn, name)(C, H, **options).to(device, dtype)
    assert not any(ours.load_state_dict(theirs.state_dict()))
    return theirs, ours


def flat(results):
    """List of tensors of (output, h) or (output, (h, c)); packed outputs as rows."""
    output, last = results
    output = output.data if isinstance(output, PackedSequence) else output
    return [output, *(last if isinstance(last, tuple) else (last,))]


def states_of(layer, batch, device="cpu"):
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    h = normal(rows, batch, layer.proj_size or H, device=device)
    return (h, normal(rows, batch, H, device=device)) if layer.mode == "LSTM" else h


def scalar(tensors):
    return sum((t.sin() * torch.linspace(0.5, 1.5, t.numel()).to(t).reshape(t.shape)).sum() for t in tensors)


def derivatives(layer, x, hx=None):
    """Results, gradients of a scalar of the results, and gradients of the squared gradients."""
    x = x.detach().clone().requires_grad_()
    hx = (
        ()
        if hx is None
        else tuple(t.detach().clone().requires_grad_() for t in (hx if isinstance(hx, tuple) else [hx]))
    )
    given = None if not hx else hx if layer.mode == "LSTM" else hx[0]
    results = flat(layer(x, given))
    inputs = [x, *hx, *layer.parameters()]
    plain = torch.autograd.grad(scalar(results), inputs, retain_graph=True)
    first = torch.autograd.grad(scalar(results), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    return [*results, *plain, *first, *second]


def assert_all_close(results, expected):
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b)
