"""Attention on feature maps against the usual block of 1x1 convolutions, bmm, softmax, bmm.

usage: pytest benchmarks/suites/bench_image_layers.py --benchmark-only
       python -m benchmarks.suites.bench_image_layers [SIDE ...]

The second measures the peak memory of a training step, each in a process of its own.
"""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from fastgen.bench.cases import UsualSelfAttention
from fastgen.nn import SelfAttention2d

BATCH = 16
CASES = [(32, 64, 1), (32, 256, 1), (64, 64, 1), (64, 256, 1), (64, 64, 2), (64, 256, 2)]
"""Height and width, channels, pooling of keys and values."""


def layer_of(whose: str, channels: int, pool: int) -> nn.Module:
    """With gamma away from 0, where it would be the identity."""
    made = (
        SelfAttention2d(channels, pool=pool if pool > 1 else False)
        if whose == "ours"
        else UsualSelfAttention(channels, pool)
    )
    nn.init.ones_(made.gamma)
    return made


def training_step(layer: nn.Module, x: Tensor, upstream: Tensor) -> None:
    torch.autograd.grad(layer(x), [x, *layer.parameters()], upstream)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "{0}x{0}, C = {1}, pool {2}".format(*case))
def test_training_step(against, device, case):
    side, channels, pool = case
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ours, usual = (layer_of(whose, channels, pool).to(device, dtype) for whose in ("ours", "usual"))
    usual.load_state_dict(ours.state_dict())
    x = torch.randn(BATCH, channels, side, side, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn_like(x)
    against(
        lambda: training_step(ours, x, upstream),
        {"bmm, softmax, bmm": lambda: training_step(usual, x, upstream)},
        rounds=9 if side < 64 else 5,
    )


# --------------------------------------------------------------------------------------------------
# Peak memory


def measure(whose: str, side: int) -> float:
    """MiB beyond what the process held before, of a step on one map of 64 channels."""
    layer = layer_of(whose, 64, 1)
    for size in (8, side):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        x = torch.randn(1, 64, size, size, requires_grad=True)
        training_step(layer, x, torch.ones_like(x))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> int:
    if sys.argv[1:2] == ["--one"]:
        print(measure(sys.argv[2], int(sys.argv[3])))
        return 0
    sides = [int(word) for word in sys.argv[1:]] or [32, 64, 96]
    print("| (1, 64, H, W) float32 | positions | ours, MiB | bmm, softmax, bmm, MiB |\n|---|---|---|---|")
    for side in sides:
        command = [sys.executable, "-m", "benchmarks.suites.bench_image_layers", "--one"]
        found = [
            float(subprocess.run([*command, whose, str(side)], check=True, capture_output=True, text=True).stdout)
            for whose in ("ours", "usual")
        ]
        print(f"| {side} x {side} | {side * side} | " + " | ".join(f"{mib:.0f}" for mib in found) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
