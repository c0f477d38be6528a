"""The layers of a WaveNet: over all samples at once, and one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatedLayer(nn.Module):
    """A dilated causal convolution of two taps, its gate, and what becomes of it.

    ``last``: nothing comes after it but the sum of the skips.
    """

    def __init__(self, config: Any, dilation: int, last: bool) -> None:
        super().__init__()
        self.dilation, self.channels = dilation, 0 if last else config.channels
        self.taps = nn.Linear(2 * config.channels, 2 * config.channels)
        self.out = nn.Linear(config.channels, self.channels + config.skip_channels)

    def forward(self, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """x (B, N, channels) -> the same and the skip (B, ., skip_channels), of the last ``length`` samples.

        Where x does not reach back far enough, there are zeros.
        """
        missing = max(0, length + self.dilation - x.size(1))
        past = F.pad(x, (0, 0, missing, 0)) if missing else x
        past = past[:, -length - self.dilation : -self.dilation]
        return self.step(past, x[:, -length:])

    def step(self, past: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        """Of samples (..., channels) and those ``dilation`` before."""
        filtered, gate = self.taps(torch.cat((past, now), -1)).chunk(2, -1)
        out: Tensor = self.out(filtered.tanh() * gate.sigmoid())
        change, skip = out.split((self.channels, out.size(-1) - self.channels), -1)
        return now + change if self.channels else now, skip


class LayerSteps:
    """Layers one sample at a time, for ``batch`` sounds, before which there is nothing.

    A layer needs just one value from ``dilation`` samples ago, which it keeps in a ring (Le Paine et al., "Fast WaveNet
    generation algorithm", 2016). Operations so small cost more than their arithmetic, so there are few: what all layers
    get from their rings is one product; then each layer is two, with tanh(f) * sigmoid(g) = tanh(f) * (1 + tanh(g / 2))
    / 2, whose constants are in the weights, and biases on a column of ones beside the gated values; the skips are one.
    """

    def __init__(self, layers: Sequence[GatedLayer], batch: int) -> None:
        depth, channels = len(layers), layers[0].taps.in_features // 2
        weight = layers[0].taps.weight
        half = torch.cat((weight.new_ones(channels), weight.new_full((channels,), 0.5)))  # of the gate
        taps = [layer.taps.weight.detach() * half[:, None] for layer in layers]
        self.past_weight = torch.stack([tap[:, :channels].t() for tap in taps])
        self.bias = torch.stack([(layer.taps.bias.detach() * half)[None] for layer in layers])
        self.now_weights = [tap[:, channels:].t().contiguous() for tap in taps]
        out = [torch.cat((0.5 * layer.out.weight.detach().t(), layer.out.bias.detach()[None])) for layer in layers]
        self.changes = [whole[:, : layer.channels].contiguous() for whole, layer in zip(out, layers, strict=True)]
        self.skips = torch.cat([whole[:, layer.channels :] for whole, layer in zip(out, layers, strict=True)])

        dilations = torch.tensor([layer.dilation for layer in layers])
        self.period = int(dilations.max())  # all are powers of two
        first = dilations.cumsum(0) - dilations
        self.places = (first + torch.arange(self.period)[:, None] % dilations).to(weight.device)
        self.ring = weight.new_zeros(int(dilations.sum()), batch, channels)

        self.states = weight.new_empty(depth, batch, channels)
        self.gates = weight.new_empty(depth, batch, 2 * channels)
        self.gated = weight.new_ones(batch, depth * (channels + 1))
        self.state = list(self.states.unbind(0))
        self.gate = list(self.gates.unbind(0))
        self.halves = [gate.chunk(2, 1) for gate in self.gate]
        with_ones = self.gated.view(batch, depth, channels + 1)
        self.value = list(with_ones[..., :channels].unbind(1))
        self.value_and_one = list(with_ones.unbind(1))
        self.time = 0

    def step(self, x: Tensor) -> Tensor:
        """The sum of the layers' skips (batch, skip_channels) of what comes into the first (batch, channels)."""
        places = self.places[self.time % self.period]
        torch.baddbmm(self.bias, self.ring.index_select(0, places), self.past_weight, out=self.gates)
        self.state[0].copy_(x)
        last = len(self.state) - 1
        for i, gate in enumerate(self.gate):
            gate.addmm_(self.state[i], self.now_weights[i]).tanh_()
            filtered, opened = self.halves[i]
            torch.addcmul(filtered, filtered, opened, out=self.value[i])
            if i < last:
                torch.addmm(self.state[i], self.value_and_one[i], self.changes[i], out=self.state[i + 1])
        self.ring.index_copy_(0, places, self.states)
        self.time += 1
        return self.gated @ self.skips


def cosines(n: int) -> Tensor:
    """(n, n): the orthonormal cosine transform (DCT-II); row k has k half waves."""
    turn = math.pi / n * torch.outer(torch.arange(n), torch.arange(n) + 0.5)
    scale = torch.full((n, 1), math.sqrt(2 / n))
    scale[0] = math.sqrt(1 / n)
    return scale * turn.cos()
