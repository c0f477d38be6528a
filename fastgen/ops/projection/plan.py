"""The choice for a projection on a GPU: the fused kernels, or PyTorch's product (cuBLAS) with separate passes for the
epilogue.

A roofline estimate, not measured: a product takes the time of its arithmetic or of its memory traffic, and a pass the
time of its memory traffic, forward and backward together. The kernels multiply by mma.sync, which on Hopper reaches
about 60 % of the rate of cuBLAS's wgmma (Luo et al., "Benchmarking and dissecting the Nvidia Hopper GPU architecture",
2024); they save passes over memory.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen._dynamo import constant, is_dynamo_compiling
from fastgen.backend import device_capability


class Chip(NamedTuple):
    """FLOP/s of dense products and bytes/s from data sheets, and the share of FLOP/s that each way should reach."""

    name: str
    half: float
    tf32: float
    single: float
    bandwidth: float
    kernel_share: float
    library_share: float


CHIPS = {
    8: Chip("A100", 312e12, 156e12, 19.5e12, 2.0e12, kernel_share=0.65, library_share=0.8),
    9: Chip("H200", 989e12, 494e12, 67e12, 4.8e12, kernel_share=0.45, library_share=0.7),
    12: Chip("RTX 5090", 209e12, 105e12, 105e12, 1.8e12, kernel_share=0.7, library_share=0.8),
}
"""Keys are major numbers of the compute capability."""

LAUNCH = 4e-6
"""Least time of a kernel launch, in seconds."""


class Problem(NamedTuple):
    """A product of (tokens, inputs) and (inputs, outputs), and the memory passes of its epilogue.

    ``forward_passes``, ``backward_passes``, ``launches``: additional passes over a matrix of the outputs' size, and
    their launches, where every step has its own kernel; ``kernel_passes``, ``kernel_launches``: the same for the fused
    kernels. ``filled``: share of the kernels' tiles that is not padding.
    """

    tokens: int
    inputs: int
    outputs: int
    element_size: int
    allow_tf32: bool = False
    forward_passes: float = 0.0
    backward_passes: float = 0.0
    launches: int = 0
    kernel_passes: float = 0.0
    kernel_launches: int = 0
    filled: float = 1.0


class Estimate(NamedTuple):
    """Seconds of forward and backward, by the fused kernels and by cuBLAS."""

    kernel: float
    library: float

    @property
    def takes_library(self) -> bool:
        return self.library < self.kernel


def _product(problem: Problem, chip: Chip, rate: float) -> float:
    flops = 2.0 * problem.tokens * problem.inputs * problem.outputs
    elements = problem.tokens * (problem.inputs + problem.outputs) + problem.inputs * problem.outputs
    return max(flops / rate, elements * problem.element_size / chip.bandwidth)


@lru_cache(maxsize=4096)
def estimate(problem: Problem, major: int) -> Estimate:
    """Estimate for a GPU of that major compute capability; an unknown one is treated as the newest known."""
    chip = CHIPS.get(major, CHIPS[max(CHIPS)])
    narrow = problem.element_size == 2
    # float32 at float32 accuracy is three products in tf32.
    tensor_cores = chip.half if narrow else chip.tf32 if problem.allow_tf32 else chip.tf32 / 3
    library = chip.half if narrow else chip.tf32 if problem.allow_tf32 else chip.single
    outputs = problem.tokens * problem.outputs * problem.element_size / chip.bandwidth
    by_kernel = 3 * _product(problem, chip, tensor_cores * chip.kernel_share * problem.filled)
    by_library = 3 * _product(problem, chip, library * chip.library_share)
    passes = problem.forward_passes + problem.backward_passes
    return Estimate(
        by_kernel + problem.kernel_passes * outputs + (4 + problem.kernel_launches) * LAUNCH,
        by_library + passes * outputs + (3 + problem.launches) * LAUNCH,
    )


def heads_problem(
    tokens: int,
    inputs: int,
    sizes: list[tuple[int, int]],
    normed: int,
    rotated: int,
    element_size: int,
    allow_tf32: bool = False,
) -> Problem:
    """The problem of ``qkv_projection``; sizes are (heads, head dim) of each part."""
    outputs = sum(h * d for h, d in sizes)
    of_norms = sum(h * d for h, d in sizes[:normed]) / outputs
    of_rotary = sum(h * d for h, d in sizes[:rotated]) / outputs
    tile = 128
    whole = sizes[: max(normed, rotated)]
    used = sum(h * d for h, d in whole) + sum(h * d for h, d in sizes[len(whole) :])
    paid = sum(h * d * tile / (tile // d * d) if d <= tile else h * d for h, d in whole) + sum(
        h * d for h, d in sizes[len(whole) :]
    )
    # Beside cuBLAS: float32 copies, normalization, halves, products, and back; and the gradients concatenated. One
    # launch for each part's product, about fourteen for each part with an epilogue.
    return Problem(
        tokens,
        inputs,
        outputs,
        element_size,
        allow_tf32,
        forward_passes=6 * of_norms + 12 * of_rotary,
        backward_passes=3 + 10 * of_norms + 12 * of_rotary,
        launches=len(sizes) + 2 + 14 * max(normed, rotated),
        kernel_passes=of_norms + 3 * max(of_norms, of_rotary),
        kernel_launches=2 * max(normed, rotated),
        filled=used / paid,
    )


def merge_problem(
    tokens: int,
    inputs: int,
    outputs: int,
    element_size: int,
    allow_tf32: bool = False,
    *,
    bias: bool = False,
    residual: bool = False,
    gate: bool = False,
    channels_first: bool = False,
) -> Problem:
    """The problem of ``merge_heads_projection``. cuBLAS adds a bias, but not along the tokens of a feature map."""
    forward = (2.0 if residual else 0.0) + (2.0 if bias and channels_first else 0.0)
    launches = int(residual) + int(bias and channels_first) + int(bias) + (6 if gate else 0)
    return Problem(tokens, inputs, outputs, element_size, allow_tf32, forward, float(bias), launches)


def refused(
    dtype: torch.dtype, channels: list[int], parts: int = 1, whole_heads: list[int] | None = None
) -> str | None:
    """Why the kernels do not take a projection of these channels and head dims; None where they do."""
    chunk = 16 // dtype.itemsize
    for size in channels:
        if size == 0 or size % chunk:
            return f"the projection kernels take channels and head dims that are multiples of {chunk}, not {size}"
    if parts > MAX_PARTS:
        return f"the projection kernels take up to {MAX_PARTS} parts, not {parts}"
    widest = max(whole_heads or [0])
    if widest > WIDEST_EPILOGUE_HEAD:
        return (
            f"the projection kernels apply norms and rotary embedding to head dims up to {WIDEST_EPILOGUE_HEAD},"
            f" not {widest}"
        )
    return None


MAX_PARTS = 4
WIDEST_EPILOGUE_HEAD = 128


def _major(tensor: Tensor) -> int | None:
    """None for a fake tensor on a device that this machine lacks."""
    capability = device_capability(tensor.device)
    return None if capability is None else capability[0]


@constant
def _constant_major(tensor: Tensor) -> int | None:
    return _major(tensor)


def slower(problem: Problem, tensor: Tensor) -> bool:
    """Whether the kernels are expected to be slower than cuBLAS for tensors like this one; False for sizes that
    torch.compile keeps symbolic, and for a GPU that this machine lacks."""
    if tensor.device.type != "cuda" or not all(isinstance(size, int) for size in problem[:3]):
        return False
    major = _constant_major(tensor) if is_dynamo_compiling() else _major(tensor)
    return major is not None and estimate(problem, major).takes_library
