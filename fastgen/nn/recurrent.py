"""Recurrent layers in place of torch's: the same arguments, results and state dicts, and derivatives of every order.

torch hands these layers to cuDNN on a GPU, whose backward pass cannot be differentiated: a gradient penalty through a
recurrent discriminator raises there. Here cuDNN computes the output and first derivatives all the same, and the
recurrence, in differentiable operations, what is differentiated further. Forward mode and ``torch.func`` take the
recurrence too: step by step, in O(T) small operations.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastgen.checks import require_device, require_floating, require_shape, require_tensor, shape_of
from fastgen.functional.recurrent import autocast_dtype, recurrent


def _weights(layer: torch.nn.RNNBase) -> list[Tensor]:
    """In torch's order. Values put in place of parameters, by torch.func.functional_call for instance, are taken."""
    weights = [getattr(layer, name) for name in layer._flat_weights_names]
    if all(isinstance(weight, torch.nn.Parameter) for weight in weights):
        layer._update_flat_weights()  # in one chunk of memory, for cuDNN
    return weights


def _batched(layer: torch.nn.RNNBase, input: Any) -> tuple[Tensor, Tensor | None, Any]:
    """The data with a batch dim, the batch sizes of a packed sequence, and the size of the batch."""
    if isinstance(input, PackedSequence):
        data, sizes, meaning = input.data, input.batch_sizes, "(rows, {})"
        require_tensor("input", data)
    else:
        require_tensor("input", input)
        data, sizes = input, None
        meaning = "(B, T, {0}) or (T, {0})" if layer.batch_first else "(T, B, {0}) or (T, {0})"
    if data.dim() not in ((2, 3) if sizes is None else (2,)) or data.size(-1) != layer.input_size:
        raise ValueError(f"input: expected {meaning.format(layer.input_size)}, got {shape_of(data)}")
    if sizes is not None:
        if not torch.compiler.is_compiling():
            _require_packed(sizes.tolist(), data.size(0))
        return data, sizes, sizes[0]
    batch_dim = 0 if layer.batch_first else 1
    data = data.unsqueeze(batch_dim) if data.dim() == 2 else data
    return data, None, data.size(batch_dim)


def _require_packed(sizes: list[int], rows: int) -> None:
    """Of a sequence that was packed by hand: torch's layers drop rows, or read states that are not there."""
    if not sizes or sizes[-1] < 1 or any(a < b for a, b in itertools.pairwise(sizes)) or sum(sizes) != rows:
        raise ValueError(
            "input: expected a packed sequence with at least one time step, whose batch sizes do not grow, are at least"
            f" 1 and add up to its {rows} rows, got {sizes if len(sizes) <= 8 else [*sizes[:8], '...']}"
        )


def _require_dtype(name: str, tensor: Tensor, weight: Tensor) -> None:
    """That of the weights; under autocast, which lowers them all, any but float64."""
    require_floating(name, tensor)
    wide = torch.float64 in (tensor.dtype, weight.dtype)
    if tensor.dtype != weight.dtype and (wide or autocast_dtype(tensor.device) is None):
        raise TypeError(f"{name}: expected the dtype of the weights, {weight.dtype}, got {tensor.dtype}")
    require_device(name, tensor, "the weights", weight)


def _states(
    layer: torch.nn.RNNBase, hx: Any, data: Tensor, weight: Tensor, batch: Any, unbatched: bool
) -> list[Tensor]:
    """h, and c of an LSTM: those given, with a batch dim, or zeros."""
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    names, widths = ["hx"], [layer.hidden_size]
    if layer.mode == "LSTM":
        names, widths = ["hx[0]", "hx[1]"], [layer.proj_size or layer.hidden_size, layer.hidden_size]
    if hx is None:
        return [torch.zeros(rows, batch, width, dtype=data.dtype, device=data.device) for width in widths]
    if layer.mode == "LSTM" and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
        raise TypeError(f"hx: expected a pair (h, c), got {type(hx).__name__}")
    states = list(hx) if layer.mode == "LSTM" else [hx]
    for name, state, width in zip(names, states, widths, strict=True):
        require_tensor(name, state)
        _require_dtype(name, state, weight)
        if unbatched:
            require_shape(name, state, (rows, width), "(layers * directions, features)")
        else:
            require_shape(name, state, (rows, int(batch), width), "(layers * directions, B, features)")
    return [state.unsqueeze(1) for state in states] if unbatched else states


def _forward(layer: torch.nn.RNNBase, input: Any, hx: Any) -> tuple[Any, Any]:
    """What both layers do around the recurrence."""
    data, batch_sizes, batch = _batched(layer, input)
    unbatched = batch_sizes is None and input.dim() == 2
    weights = _weights(layer)
    _require_dtype("input", data, weights[0])
    states = _states(layer, hx, data, weights[0], batch, unbatched)
    if hx is not None and batch_sizes is not None and input.sorted_indices is not None:
        states = [state.index_select(1, input.sorted_indices) for state in states]
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
    result: Any = output
    if unbatched:
        result, last = output.squeeze(0 if layer.batch_first else 1), [state.squeeze(1) for state in last]
    elif batch_sizes is not None:
        order, restore = input.sorted_indices, input.unsorted_indices
        result = PackedSequence(output, batch_sizes, order, restore)
        last = last if restore is None else [state.index_select(1, restore) for state in last]
    return result, tuple(last) if layer.mode == "LSTM" else last[0]


class LSTM(torch.nn.LSTM):
    """Long short-term memory, in place of ``torch.nn.LSTM``.

    Arguments, shapes and results are torch's; see there. A gradient in eval mode is there on a GPU too. On a GPU,
    dropout between layers runs layer by layer, with other random numbers than cuDNN's. As with torch's,
    ``torch.compile`` leaves the layer out of its graphs unless ``torch._dynamo.config.allow_rnn``. ``torch.jit.trace``
    and ``torch.export`` take it, ``torch.jit.script`` does not.

    Raises:
        TypeError: an input or hx of another dtype than the weights, hx that is no pair of tensors.
        ValueError: an input or hx of a shape or on a device that does not fit, no time step, or a packed sequence whose
            batch sizes do not fit its rows.

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
