"""Derivatives of stacked recurrent layers. torch's implementations for accelerators have only first derivatives.

These serve the forward and the first backward pass. Higher derivatives use the recurrence in operations that autograd,
forward mode and torch.func differentiate to any order.

A tuple of states is (h,) of a GRU, (h, c) of an LSTM. Weights are flat, as torch orders them: for each layer, for each
direction, w_ih, w_hh [, b_ih, b_hh] [, w_hr].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import get_gradient_edge
from torch.nn.functional import dropout, linear

from fastgen.backend import device_capability
from fastgen.checks import has_data
from fastgen.ops.autograd import in_graph, must_be_differentiable, transforms_active


class Recurrence(NamedTuple):
    """Configuration of a stack of layers. ``low`` is the dtype to which autocast lowers all tensors."""

    mode: str
    bias: bool
    num_layers: int
    bidirectional: bool
    batch_first: bool
    low: torch.dtype | None = None


# --------------------------------------------------------------------------------------------------
# The recurrence


def _lstm_cell(
    gates: Tensor, states: tuple[Tensor, ...], w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None
) -> tuple[Tensor, ...]:
    hidden, cell = states
    i, f, g, o = (gates + linear(hidden, w_hh, b_hh)).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * cell.tanh()
    return hidden if w_hr is None else linear(hidden, w_hr), cell


def _gru_cell(
    gates: Tensor, states: tuple[Tensor, ...], w_hh: Tensor, b_hh: Tensor | None, w_hr: None
) -> tuple[Tensor, ...]:
    (hidden,) = states
    from_input, from_hidden = gates.chunk(3, -1), linear(hidden, w_hh, b_hh).chunk(3, -1)
    reset, update = ((a + b).sigmoid() for a, b in zip(from_input[:2], from_hidden[:2], strict=True))
    new = (from_input[2] + reset * from_hidden[2]).tanh()
    return (new + update * (hidden - new),)


_CELLS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"LSTM": _lstm_cell, "GRU": _gru_cell}


def _run_direction(
    mode: str, gates: Sequence[Tensor], states: tuple[Tensor, ...], weights: Sequence[Tensor | None], reverse: bool
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The hidden state of each step, and the last states of each sequence.

    Sequences of a packed batch are sorted, the longest first: a step computes the first rows, and the states of the
    other sequences, finished or not started, are unchanged.
    """
    hidden = []
    for step in reversed(gates) if reverse else gates:
        rows = step.size(0)
        if rows == states[0].size(0):
            states = _CELLS[mode](step, states, *weights)
            hidden.append(states[0])
        else:
            new = _CELLS[mode](step, tuple(s[:rows] for s in states), *weights)
            states = tuple(torch.cat((n, s[rows:])) for n, s in zip(new, states, strict=True))
            hidden.append(new[0])
    return hidden[::-1] if reverse else hidden, states


def _of_direction(weights: Sequence[Tensor], bias: bool) -> tuple[Tensor | None, ...]:
    """w_ih, b_ih, w_hh, b_hh, w_hr."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if bias else (None, None)
    projection = rest[2:] if bias else rest
    return w_ih, b_ih, w_hh, b_hh, projection[0] if projection else None


def recurrence(
    stack: Recurrence, data: Tensor, batch_sizes: Tensor | None, states: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """torch.lstm and torch.gru in plain PyTorch: the output and the last states.

    LSTM: Hochreiter and Schmidhuber (1997) with the forget gates of Gers et al. (2000) and the projection of Sak et
    al. (2014); GRU: Cho et al. (2014), with the reset gate applied after the product, as in cuDNN.
    """
    directions = 2 if stack.bidirectional else 1
    each = len(weights) // (stack.num_layers * directions)
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    swapped = stack.batch_first and sizes is None
    data = data.transpose(0, 1) if swapped else data
    last = []
    for layer in range(stack.num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            w_ih, b_ih, *inner = _of_direction(weights[index * each : (index + 1) * each], stack.bias)
            gates = linear(data, w_ih, b_ih)  # type: ignore[arg-type]
            steps = gates.unbind(0) if sizes is None else gates.split(sizes)
            first = tuple(s[index] for s in states)
            hidden, final = _run_direction(stack.mode, steps, first, inner, direction == 1)
            outputs.append(torch.stack(hidden) if sizes is None else torch.cat(hidden))
            last.append(final)
        data = torch.cat(outputs, -1) if directions == 2 else outputs[0]
    return data.transpose(0, 1) if swapped else data, *(torch.stack(s) for s in zip(*last, strict=True))


def _lowered_recurrence(
    stack: Recurrence, data: Tensor, batch_sizes: Tensor | None, states: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The recurrence with the dtypes of torch's implementation under autocast."""
    if stack.low is None:
        return recurrence(stack, data, batch_sizes, states, weights)
    with torch.autocast(data.device.type, enabled=False):
        data, low = data.to(stack.low), stack.low
        return recurrence(stack, data, batch_sizes, [s.to(low) for s in states], [w.to(low) for w in weights])


# --------------------------------------------------------------------------------------------------
# torch's implementation


def torch_recurrence(
    stack: Recurrence,
    data: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    probability: float = 0.0,
    train: bool = True,
) -> tuple[Tensor, ...]:
    """torch.lstm or torch.gru: cuDNN, MIOpen, oneDNN, or torch's cells."""
    function: Any = torch.lstm if stack.mode == "LSTM" else torch.gru
    hx = list(states) if stack.mode == "LSTM" else states[0]
    rest = (list(weights), stack.bias, stack.num_layers, probability, train, stack.bidirectional)
    if batch_sizes is None:
        result = function(data, hx, *rest, stack.batch_first)
    else:
        result = function(data, batch_sizes, hx, *rest)
    return tuple(result)


class _OnceDifferentiable(Function):
    """torch's implementation and its backward pass; the recurrence where that is to be differentiated."""

    @staticmethod
    def forward(ctx: Any, stack: Recurrence, batch_sizes: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.stack, ctx.batch_sizes = stack, batch_sizes
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(n) for t, n in zip(tensors, ctx.needs_input_grad[2:], strict=True)]
            results = torch_recurrence(stack, *_arguments(stack, batch_sizes, leaves))
        ctx.save_for_backward(*tensors)
        ctx.inner = leaves, [get_gradient_edge(result) for result in results]
        ctx.set_materialize_grads(False)
        return tuple(result.detach() for result in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = {index: grad for index, grad in enumerate(grads) if grad is not None}
        wanted = ctx.needs_input_grad[2:]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        tensors = ctx.saved_tensors  # raises where the graph was freed, or an input written to
        take = _differentiable_gradients if must_be_differentiable() else _first_gradients
        results = iter(take(ctx, tensors, wanted, given))
        return None, None, *(next(results) if want else None for want in wanted)


def _arguments(
    stack: Recurrence, batch_sizes: Tensor | None, tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None, Sequence[Tensor], Sequence[Tensor]]:
    """Arguments of an implementation after the stack: data, batch_sizes, states, weights."""
    states = 2 if stack.mode == "LSTM" else 1
    return tensors[0], batch_sizes, tensors[1 : 1 + states], tensors[1 + states :]


def _first_gradients(
    ctx: Any, tensors: Sequence[Tensor], wanted: Sequence[bool], given: dict[int, Tensor]
) -> Sequence[Tensor]:
    leaves, edges = ctx.inner
    keep = torch._C._autograd._get_current_graph_task_keep_graph()
    if not keep:
        ctx.inner = None  # like autograd's saved tensors: a loss that is kept does not keep the activations
    inputs = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
    outputs, grads = [edges[index] for index in given], list(given.values())
    return torch.autograd.grad(outputs, inputs, grads, retain_graph=keep, materialize_grads=True)


def _differentiable_gradients(
    ctx: Any, tensors: Sequence[Tensor], wanted: Sequence[bool], given: dict[int, Tensor]
) -> Sequence[Tensor]:
    differentiated = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, since one input may have been computed from another: the gradient ends at this layer's inputs.
        inputs = [t.view_as(t) for t in tensors]
        results = _lowered_recurrence(ctx.stack, *_arguments(ctx.stack, ctx.batch_sizes, inputs))
        aliases = [alias for alias, want in zip(inputs, wanted, strict=True) if want]
        outputs = [results[index] for index in given]
        grads = [grad.to(output.dtype) for grad, output in zip(given.values(), outputs, strict=True)]
        return torch.autograd.grad(outputs, aliases, grads, create_graph=differentiated, materialize_grads=True)


def accelerated(device: torch.device) -> bool:
    """Whether torch may pass the device's layers to a library (cuDNN, MIOpen, MPS).

    Its backward pass has no derivative, and under autocast it lowers all tensors.
    """
    return device.type != "cpu"


def _traced_for_another_machine(data: Tensor) -> bool:
    """Whether data is a fake tensor on a GPU that this machine lacks, for which torch's kernels cannot be traced."""
    return accelerated(data.device) and not (data.is_meta or has_data(data)) and device_capability(data.device) is None


def _without_dropout(
    stack: Recurrence,
    data: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    train: bool,
) -> tuple[Tensor, ...]:
    if transforms_active() or _traced_for_another_machine(data):
        return _lowered_recurrence(stack, data, batch_sizes, states, weights)
    tensors = (data, *states, *weights)
    if accelerated(data.device) and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        result: tuple[Tensor, ...] = _OnceDifferentiable.apply(  # type: ignore[no-untyped-call]
            stack, batch_sizes, *tensors
        )
        return result
    return torch_recurrence(stack, data, batch_sizes, states, weights, train=train)


def _layer_by_layer(
    stack: Recurrence,
    data: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    probability: float,
) -> tuple[Tensor, ...]:
    """With dropout between layers, applied here: cuDNN's mask is not available for the second derivative.

    Without gradients too: a checkpoint that recomputes with gradients must use the same mask.
    """
    one = stack._replace(num_layers=1)
    last = []
    with warnings.catch_warnings():
        # cuDNN copies one layer's weights, which cannot be one chunk of memory.
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        for layer, (start, of_layer) in enumerate(zip(*_split(stack, states, weights), strict=True)):
            if layer > 0:
                data = dropout(data, probability)
            data, *final = _without_dropout(one, data, batch_sizes, start, of_layer, True)
            last.append(final)
    return data, *(torch.cat(s) for s in zip(*last, strict=True))


def _split(
    stack: Recurrence, states: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[list[tuple[Tensor, ...]], list[Sequence[Tensor]]]:
    """The states and the weights of each layer."""
    each = len(weights) // stack.num_layers
    starts = list(zip(*(s.chunk(stack.num_layers) for s in states), strict=True))
    return starts, [weights[layer * each : (layer + 1) * each] for layer in range(stack.num_layers)]


@in_graph
def recurrent_layers(
    stack: Recurrence,
    data: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    probability: float,
    train: bool,
) -> tuple[Tensor, ...]:
    """The output and the last states, with derivatives of every order.

    Dropout between the layers where ``train``. On CPU torch's implementation is differentiable to any order in reverse
    mode, and serves it.
    """
    if not train or probability == 0 or stack.num_layers == 1:
        return _without_dropout(stack, data, batch_sizes, states, weights, train)
    if transforms_active() or accelerated(data.device):
        return _layer_by_layer(stack, data, batch_sizes, states, weights, probability)
    return torch_recurrence(stack, data, batch_sizes, states, weights, probability, train)
