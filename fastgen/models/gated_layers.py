"""Gated dilated causal convolutions: for whole sounds, and for one sample at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.nn._sublayers import is_pointwise, is_unhooked, weight_and_bias


class GatedLayer(nn.Module):
    """Gated dilated causal convolution of two taps, with residual and skip outputs.

    Args:
        config: channels and skip_channels.
        dilation: distance of the taps, in samples.
        last: whether this is the last layer, which has no residual output.
    """

    def __init__(self, config: Any, dilation: int, last: bool) -> None:
        super().__init__()
        self.dilation, self.channels = dilation, 0 if last else config.channels
        self.taps = nn.Linear(2 * config.channels, 2 * config.channels)
        self.out = nn.Linear(config.channels, self.channels + config.skip_channels)

    def forward(self, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """x (B, N, channels) -> output (B, length, channels) and skip (B, length, skip_channels) of the last samples.

        x is padded with zeros on the left if it is shorter than length + dilation.
        """
        missing = max(0, length + self.dilation - x.size(1))
        past = F.pad(x, (0, 0, missing, 0)) if missing else x
        past = past[:, -length - self.dilation : -self.dilation]
        return self.step(past, x[:, -length:])

    def step(self, past: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        """Output and skip for samples ``now`` (..., channels) and those ``dilation`` before, ``past``."""
        filtered, gate = self.taps(torch.cat((past, now), -1)).chunk(2, -1)
        out: Tensor = self.out(filtered.tanh() * gate.sigmoid())
        change, skip = out.split((self.channels, out.size(-1) - self.channels), -1)
        return now + change if self.channels else now, skip


class GatedLayers(nn.ModuleList):
    def __iter__(self) -> Iterator[GatedLayer]:  # type: ignore[override]
        return cast(Iterator[GatedLayer], super().__iter__())


class LayerSteps:
    """All layers one sample at a time, for ``batch`` sounds that begin with zeros.

    Each layer keeps its last ``dilation`` inputs in a ring buffer (Le Paine et al., "Fast WaveNet generation
    algorithm", 2016). Calls of this size cost more than their arithmetic, so there are few: one batched product for the
    past taps of all layers, two products per layer, one for all skips. The gate is tanh(f) * sigmoid(g) =
    tanh(f) * (1 + tanh(g / 2)) / 2, its constants folded into the weights; biases multiply a column of ones.
    """

    def __init__(self, layers: Sequence[GatedLayer], batch: int) -> None:
        of_taps, of_out = ([weight_and_bias(part) for part in parts] for parts in _parts(layers))
        weight = of_taps[0][0]
        depth, channels = len(layers), weight.size(1) // 2
        half = torch.cat((weight.new_ones(channels), weight.new_full((channels,), 0.5)))  # g / 2 of the gate
        taps = [weight.detach() * half[:, None] for weight, _ in of_taps]
        self.past_weight = torch.stack([tap[:, :channels].t() for tap in taps])
        self.bias = torch.stack([(_required(bias).detach() * half)[None] for _, bias in of_taps])
        self.now_weights = [tap[:, channels:].t().contiguous() for tap in taps]
        out = [torch.cat((0.5 * weight.detach().t(), _required(bias).detach()[None])) for weight, bias in of_out]
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
        """Input of the first layer (batch, channels) -> sum of the skips (batch, skip_channels)."""
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


def _parts(layers: Sequence[GatedLayer]) -> tuple[list[nn.Linear], list[nn.Linear]]:
    return [layer.taps for layer in layers], [layer.out for layer in layers]


def _required(bias: Tensor | None) -> Tensor:
    assert bias is not None
    return bias


def may_be_fused(layers: Sequence[GatedLayer]) -> bool:
    """Whether ``LayerSteps`` may read the layers' weights: calling them would compute nothing else."""
    parts = [part for kind in _parts(layers) for part in kind]
    return all(is_unhooked(layer) for layer in layers) and all(
        is_pointwise(part) and part.bias is not None for part in parts
    )


class CalledLayerSteps:
    """``LayerSteps`` by a call of each layer for each sample, for layers with hooks, adapters or quantized weights."""

    def __init__(self, layers: Sequence[GatedLayer]) -> None:
        self.layers = layers
        self.past: list[Tensor] = []

    def step(self, x: Tensor) -> Tensor:
        """Input of the first layer (batch, channels) -> sum of the skips (batch, skip_channels)."""
        if not self.past:
            self.past = [x.new_zeros(len(x), layer.dilation, x.size(1)) for layer in self.layers]
        total: Tensor | None = None
        for i, layer in enumerate(self.layers):
            samples = torch.cat((self.past[i], x.unsqueeze(1)), 1)
            self.past[i] = samples[:, 1:]
            out, skip = layer(samples, 1)
            x = out.squeeze(1)
            total = skip.squeeze(1) if total is None else total + skip.squeeze(1)
        assert total is not None
        return total
