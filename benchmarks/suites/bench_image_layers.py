"""Attention on feature maps against a block of 1x1 convolutions, bmm, softmax and bmm.

usage: pytest benchmarks/suites/bench_image_layers.py --benchmark-only
       python -m benchmarks.suites.bench_image_layers [SIDE ...]

The second command measures the peak memory of a training step, each in a separate process.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from benchmarks.memory import measure_in_subprocess, peak_memory_mib
from fastgen.bench.cases import Conv1x1SelfAttention
from fastgen.nn import SelfAttention2d

BATCH = 16
CASES = [(32, 64, 1), (32, 256, 1), (64, 64, 1), (64, 256, 1), (64, 64, 2), (64, 256, 2)]
"""Height and width, channels, pooling of keys and values."""


def build(implementation: str, channels: int, pool: int) -> nn.Module:
    """Layer with gamma = 1 (it is the identity for gamma = 0)."""
    layer = (
        SelfAttention2d(channels, pool=pool if pool > 1 else False)
        if implementation == "ours"
        else Conv1x1SelfAttention(channels, pool)
    )
    nn.init.ones_(layer.gamma)
    return layer


def training_step(layer: nn.Module, x: Tensor, upstream: Tensor) -> None:
    torch.autograd.grad(layer(x), [x, *layer.parameters()], upstream)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "{0}x{0}, C = {1}, pool {2}".format(*case))
def test_training_step(against, device, case):
    side, channels, pool = case
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ours, baseline = (build(name, channels, pool).to(device, dtype) for name in ("ours", "baseline"))
    baseline.load_state_dict(ours.state_dict())
    x = torch.randn(BATCH, channels, side, side, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn_like(x)
    against(
        lambda: training_step(ours, x, upstream),
        {"bmm, softmax, bmm": lambda: training_step(baseline, x, upstream)},
        rounds=9 if side < 64 else 5,
    )


# --------------------------------------------------------------------------------------------------
# Peak memory


def measure(implementation: str, side: int) -> float:
    """Increase of the peak memory by a training step on one feature map of 64 channels, in MiB."""
    layer = build(implementation, 64, 1)
    for size in (8, side):
        before = peak_memory_mib()
        x = torch.randn(1, 64, size, size, requires_grad=True)
        training_step(layer, x, torch.ones_like(x))
    return peak_memory_mib() - before


def main() -> int:
    if sys.argv[1:2] == ["--one"]:
        print(measure(sys.argv[2], int(sys.argv[3])))
        return 0
    sides = [int(argument) for argument in sys.argv[1:]] or [32, 64, 96]
    print("| (1, 64, H, W) float32 | positions | ours, MiB | bmm, softmax, bmm, MiB |\n|---|---|---|---|")
    for side in sides:
        found = [
            measure_in_subprocess("benchmarks.suites.bench_image_layers", implementation, side)
            for implementation in ("ours", "baseline")
        ]
        print(f"| {side} x {side} | {side * side} | " + " | ".join(f"{mib:.0f}" for mib in found) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
