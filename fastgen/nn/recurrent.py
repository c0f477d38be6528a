"""Recurrent layers in place of torch's: the same arguments, results and state dicts, and derivatives of every order.

torch hands these layers to cuDNN on a GPU, whose backward pass cannot be differentiated: a gradient penalty through a
recurrent discriminator raises there. Here cuDNN computes the output and first derivatives all the same, and the
recurrence, in differentiable operations, what is differentiated further. Forward mode and ``torch.func`` take the
recurrence too: step by step, in O(T) small operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastgen._recurrent import recurrent


def _weights(layer: torch.nn.RNNBase) -> list[Tensor]:
    """In torch's order. Values put in place of parameters, by torch.func.functional_call for instance, are taken."""
    weights = [getattr(layer, name) for name in layer._flat_weights_names]
    if all(isinstance(weight, torch.nn.Parameter) for weight in weights):
        layer._update_flat_weights()  # in one chunk of memory, for cuDNN
    return weights


def _zeros(layer: torch.nn.RNNBase, data: Tensor, batch: Any) -> list[Tensor]:
    """h, and c of an LSTM."""
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = [layer.proj_size or layer.hidden_size] + ([layer.hidden_size] if layer.mode == "LSTM" else [])
    return [torch.zeros(rows, batch, width, dtype=data.dtype, device=data.device) for width in widths]


def _forward(layer: torch.nn.RNNBase, input: Tensor | PackedSequence, hx: Any) -> tuple[Any, Any]:
    """What both layers do around the recurrence. Errors are torch's, in its types and words."""
    single = layer.mode == "GRU"
    given = None if hx is None else [hx] if single else list(hx)
    batch_sizes = order = restore = None
    unbatched = False
    if isinstance(input, PackedSequence):
        data, batch_sizes, order, restore = input
        batch: Any = batch_sizes[0]
    else:
        data = input
        if data.dim() not in (2, 3):
            raise ValueError(f"input: {layer.mode} expected 2 or 3 dims, got {tuple(data.shape)}")
        unbatched = data.dim() == 2
        if given is not None and any(state.dim() != data.dim() for state in given):
            raise RuntimeError(
                f"hx: expected {data.dim()} dims, as many as input, got {[tuple(state.shape) for state in given]}"
            )
        if unbatched:
            data = data.unsqueeze(0 if layer.batch_first else 1)
            given = None if given is None else [state.unsqueeze(1) for state in given]
        batch = data.size(0 if layer.batch_first else 1)
    weights = _weights(layer)
    states = _zeros(layer, data, batch) if given is None else given
    checked: Any = states[0] if single else tuple(states)
    layer.check_forward_args(data, checked, batch_sizes)
    if order is not None and given is not None:
        states = [state.index_select(1, order) for state in states]
    output, *last = recurrent(
        layer.mode,
        data,
        batch_sizes,
        states,
        weights,
        bias=layer.bias,
        num_layers=layer.num_layers,
        dropout=layer.dropout,
        training=layer.training,
        bidirectional=layer.bidirectional,
        batch_first=layer.batch_first,
    )
    if restore is not None:
        last = [state.index_select(1, restore) for state in last]
    if unbatched:
        output, last = output.squeeze(0 if layer.batch_first else 1), [state.squeeze(1) for state in last]
    result = output if batch_sizes is None else PackedSequence(output, batch_sizes, order, restore)
    return result, last[0] if single else tuple(last)


class LSTM(torch.nn.LSTM):
    """Long short-term memory, in place of ``torch.nn.LSTM``.

    Arguments, shapes and results are torch's; see there. A gradient in eval mode is there on a GPU too. On a GPU,
    dropout between layers runs layer by layer, with other random numbers than cuDNN's.

    Raises:
        TypeError, ValueError, RuntimeError: as torch's; an input without a time step is a ``ValueError``.

    Example:
        >>> lstm = LSTM(3, 8, num_layers=2, batch_first=True)
        >>> output, (h, c) = lstm(torch.randn(4, 5, 3))
        >>> output.shape, h.shape
        (torch.Size([4, 5, 8]), torch.Size([2, 4, 8]))
    """

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:  # type: ignore[override]
        """(T, B, C), (B, T, C), (T, C) or a packed sequence -> the output alike, (h, c)."""
        return _forward(self, input, hx)


class GRU(torch.nn.GRU):
    """Gated recurrent units, in place of ``torch.nn.GRU``.

    Arguments, shapes and results are torch's; see there, and ``LSTM`` here.

    Example:
        >>> output, h = GRU(3, 8, bidirectional=True)(torch.randn(5, 4, 3))
        >>> output.shape, h.shape
        (torch.Size([5, 4, 16]), torch.Size([2, 4, 8]))
    """

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:  # type: ignore[override]
        """(T, B, C), (B, T, C), (T, C) or a packed sequence -> the output alike, h."""
        return _forward(self, input, hx)
