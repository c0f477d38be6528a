"""LSTM and GRU with higher-order derivatives, drop-in replacements for ``torch.nn.LSTM`` and ``torch.nn.GRU``.

On a GPU, torch runs these layers in cuDNN, whose backward pass is not differentiable: a gradient penalty through a
recurrent discriminator raises. Here, cuDNN still computes the output and the first derivatives; higher-order
derivatives, forward-mode AD and ``torch.func`` transforms use the recurrence in differentiable operations, time step
by time step.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastgen._dynamo import is_dynamo_compiling
from fastgen.checks import has_data, require_device, require_floating, require_shape, require_tensor, shape_of
from fastgen.functional._autocast import autocast_dtype
from fastgen.functional.recurrent import recurrent
from fastgen.ops._direct import PLAIN, is_common
from fastgen.ops.recurrent import autograd as implementation
from fastgen.ops.transforms import transforms_active


def _weights(layer: torch.nn.RNNBase) -> list[Tensor]:
    """Weights in torch's order, including tensors substituted by ``torch.func.functional_call``."""
    weights = [getattr(layer, name) for name in layer._flat_weights_names]
    if all(isinstance(weight, torch.nn.Parameter) for weight in weights):
        layer._update_flat_weights()  # cuDNN needs contiguous weights
    return weights


def _have_data(layer: torch.nn.RNNBase) -> bool:
    """False for meta and fake weights, which cuDNN cannot place in memory."""
    return all(weight is None or has_data(weight) for weight in layer._flat_weights)


def _batched(layer: torch.nn.RNNBase, input: Any) -> tuple[Tensor, Tensor | None, Any]:
    """Returns the data with a batch dim, the batch sizes of a packed sequence or None, and the batch size."""
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
    """Checks sequences that were packed by hand, for which torch's layers drop rows or read states out of bounds."""
    if not sizes or sizes[-1] < 1 or any(a < b for a, b in itertools.pairwise(sizes)) or sum(sizes) != rows:
        raise ValueError(
            "input: expected a packed sequence with at least one time step, whose batch sizes do not grow, are at least"
            f" 1 and add up to its {rows} rows, got {sizes if len(sizes) <= 8 else [*sizes[:8], '...']}"
        )


def _require_dtype(name: str, tensor: Tensor, weight: Tensor) -> None:
    """Requires the dtype of the weights; under autocast, any dtype but float64."""
    require_floating(name, tensor)
    double = torch.float64 in (tensor.dtype, weight.dtype)
    if tensor.dtype != weight.dtype and (double or autocast_dtype(tensor) is None):
        raise TypeError(f"{name}: expected the dtype of the weights, {weight.dtype}, got {tensor.dtype}")
    require_device(name, tensor, "the weights", weight)


def _states(
    layer: torch.nn.RNNBase, hx: Any, data: Tensor, weight: Tensor, batch: Any, unbatched: bool
) -> list[Tensor]:
    """Initial states with a batch dim: h, and c of an LSTM. Zeros if ``hx`` is None."""
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
    """Forward pass of both layers: checks, packing and initial states around ``recurrent``."""
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


def _is_torchs(layer: torch.nn.RNNBase, input: Any, states: tuple[Any, ...]) -> bool:
    """Whether torch's forward computes a call, at less overhead: plain CPU tensors of one dtype, outside of compilation
    and transforms. On CPU it is differentiable to any order."""
    if is_dynamo_compiling():
        return False
    if type(input) not in PLAIN or implementation.accelerated(input.device) or input.dim() != 3 or 0 in input.shape:
        return False
    dtype = input.dtype
    for state in states:
        if type(state) not in PLAIN or state.dtype != dtype or not state.is_cpu:
            return False
    return is_common() and not transforms_active() and not (layer.training and layer.dropout > 0)


class LSTM(torch.nn.LSTM):
    """Drop-in replacement for ``torch.nn.LSTM`` with higher-order and forward-mode derivatives.

    Arguments, shapes and results are the same as in ``torch.nn.LSTM``, with two differences on a GPU: gradients are
    available in eval mode, too, and dropout between layers uses other random numbers than cuDNN. As in torch,
    ``torch.compile`` breaks the graph at this layer unless ``torch._dynamo.config.allow_rnn`` is set.
    ``torch.jit.trace`` and ``torch.export`` are supported, ``torch.jit.script`` is not.

    Raises:
        TypeError: if the input or ``hx`` does not have the dtype of the weights, or ``hx`` is not a pair of tensors.
        ValueError: if the input or ``hx`` has the wrong shape or device, there is no time step, or the batch sizes of a
            packed sequence do not match its rows.

    Example:
        >>> lstm = LSTM(3, 8, num_layers=2, batch_first=True)
        >>> output, (h, c) = lstm(torch.randn(4, 5, 3))
        >>> output.shape, h.shape
        (torch.Size([4, 5, 8]), torch.Size([2, 4, 8]))
    """

    def flatten_parameters(self) -> None:
        """As in torch; nothing for weights without data."""
        if _have_data(self):
            super().flatten_parameters()

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:  # type: ignore[override]
        """Runs the recurrence.

        Args:
            input: (T, B, C), (B, T, C) with ``batch_first``, (T, C) without a batch, or a packed sequence.
            hx: initial states (h, c). Default: zeros.

        Returns:
            The output, in the layout of the input, and the final states (h, c).
        """
        if (hx is None or type(hx) is tuple) and _is_torchs(self, input, hx or ()):
            try:
                return super().forward(input, hx)
            except (RuntimeError, ValueError):  # fastgen's checks name the argument
                pass
        return _forward(self, input, hx)


class GRU(torch.nn.GRU):
    """Drop-in replacement for ``torch.nn.GRU`` with higher-order and forward-mode derivatives.

    Arguments, shapes and results are the same as in ``torch.nn.GRU``; see ``LSTM`` for differences and errors.

    Example:
        >>> output, h = GRU(3, 8, bidirectional=True)(torch.randn(5, 4, 3))
        >>> output.shape, h.shape
        (torch.Size([5, 4, 16]), torch.Size([2, 4, 8]))
    """

    def flatten_parameters(self) -> None:
        """As in torch; nothing for weights without data."""
        if _have_data(self):
            super().flatten_parameters()

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:  # type: ignore[override]
        """Runs the recurrence.

        Args:
            input: (T, B, C), (B, T, C) with ``batch_first``, (T, C) without a batch, or a packed sequence.
            hx: initial state h. Default: zeros.

        Returns:
            The output, in the layout of the input, and the final state h.
        """
        if _is_torchs(self, input, () if hx is None else (hx,)):
            try:
                return super().forward(input, hx)
            except (RuntimeError, ValueError):  # fastgen's checks name the argument
                pass
        return _forward(self, input, hx)
