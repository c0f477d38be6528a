"""Stacked recurrent layers for ``fastgen.nn``: checks and autocast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen import checks as check
from fastgen.functional._autocast import autocast_dtype
from fastgen.ops.recurrent.autograd import Recurrence, accelerated, recurrent_layers


def _lowered_dtype(data: Tensor) -> torch.dtype | None:
    """The dtype to which autocast lowers the layer; None where it does not."""
    return None if data.dtype == torch.float64 else autocast_dtype(data)


def recurrent(
    mode: str,
    data: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """A stack of LSTM or GRU layers as ``torch.lstm`` and ``torch.gru`` compute it, differentiable to any order.

    Args:
        mode: "LSTM" or "GRU".
        data: (T, B, C), (B, T, C) with ``batch_first``, or the rows of a packed batch, (sum of batch_sizes, C).
        batch_sizes: (T,), the batch sizes of a packed batch.
        states: (h,) or (h, c), each (layers * directions, B, .). The caller checks their sizes.
        weights: in the order of ``torch.nn.LSTM``.

    Returns:
        The output, in the layout of data, and the last states, in the shapes of states.

    Raises:
        ValueError: data has no time step.
    """
    packed = batch_sizes is not None
    if data.size(0 if packed or not batch_first else 1) == 0:
        raise ValueError(f"input: expected at least one time step, got {check.shape_of(data)}")
    low = _lowered_dtype(data)
    inside = accelerated(data.device)
    projected = len(weights) // (num_layers * (2 if bidirectional else 1)) in (3, 5)  # an LSTM's w_hr
    stack = Recurrence(mode, bias, num_layers, bidirectional, batch_first, low if inside else None)
    if inside or low is None or mode != "LSTM" or packed or projected:
        return recurrent_layers(stack, data, batch_sizes, states, weights, dropout, training)
    # torch passes this to oneDNN in the lower dtype and raises where oneDNN does not support it on this processor.
    # Lowered here, torch chooses an implementation that the processor supports.
    with torch.autocast(data.device.type, enabled=False):
        states, weights = [s.to(low) for s in states], [w.to(low) for w in weights]
        return recurrent_layers(stack, data.to(low), batch_sizes, states, weights, dropout, training)
