"""Rates of GPUs for the static model, per multiprocessor and clock.

Sources:
    multiprocessors, clocks, peak rates, memory: NVIDIA's data sheets and white papers of A100 (GA100), L40S and
        RTX 4090 (AD102), H100 and H200 (GH100), RTX 5090 (GB202); SXM versions of A100, H100 and H200. The clock is the
        one of the peak rate: boost.
    arithmetic: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions".
    registers, shared memory, warps, blocks: the same guide, "Technical Specifications per Compute Capability".
    cycles of mma.sync: from the peak rate, with accumulation in float32. On GH100, mma.sync reaches 63% of the peak,
        which needs wgmma (Luo et al., "Dissecting the NVIDIA Hopper Architecture through Microbenchmarking and Multiple
        Level Analysis", 2025, arXiv:2501.12084).
"""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """A GPU.

    Attributes:
        name: as tables show it.
        marks: text in the device's name; all of it.
        arch: compiled code that runs on it.
        multiprocessors: their number.
        clock: Hz.
        flops: peak of dense bfloat16 products with float32 sums, per second.
        bandwidth: of its memory, bytes per second.
        mma_cycles: of a quarter of a multiprocessor for one mma.m16n8k16.
        fma_cycles: of a quarter for one FFMA of a warp.
        alu_cycles: of a quarter for one integer, compare or select instruction of a warp.
        shared_memory: bytes per multiprocessor; a block also takes 1 KiB.
        warps: maximum resident per multiprocessor.
        blocks: maximum resident per multiprocessor.
        top_clock: Hz, the highest; of the roofline.
        launch: seconds from the start of a kernel to its first block and from its last one to the end: an assumption.
    """

    name: str
    marks: tuple[str, ...]
    arch: str
    multiprocessors: int
    clock: float
    flops: float
    bandwidth: float
    mma_cycles: float
    fma_cycles: float
    alu_cycles: float
    shared_memory: int
    warps: int
    blocks: int
    top_clock: float
    launch: float = 2e-6

    @property
    def special_cycles(self) -> float:
        """Of a quarter for one MUFU of a warp: 16 results per clock and multiprocessor on every chip."""
        return 8.0

    @property
    def imad_cycles(self) -> float:
        """Of a quarter for one IMAD of a warp: 64 results per clock and multiprocessor on every chip."""
        return 2.0

    @property
    def shared_bytes(self) -> float:
        """Of shared memory per clock and multiprocessor."""
        return 128.0

    @property
    def exponentials(self) -> float:
        """Per second."""
        return 16 * self.multiprocessors * self.top_clock


CHIPS = (
    Chip("A100 80GB", ("A100",), "80", 108, 1.41e9, 312e12, 2.04e12, 8, 2, 2, 164 << 10, 64, 32, 1.41e9),
    Chip("L40S", ("L40S",), "89", 142, 2.52e9, 362e12, 0.864e12, 16, 1, 2, 100 << 10, 48, 24, 2.52e9),
    Chip("RTX 4090", ("RTX 4090",), "89", 128, 2.52e9, 165.2e12, 1.008e12, 32, 1, 2, 100 << 10, 48, 24, 2.52e9),
    Chip("H100", ("H100",), "90a", 132, 1.83e9, 989e12, 3.35e12, 4 / 0.63, 1, 2, 228 << 10, 64, 32, 1.98e9),
    Chip("H200", ("H200",), "90a", 132, 1.83e9, 989e12, 4.8e12, 4 / 0.63, 1, 2, 228 << 10, 64, 32, 1.98e9),
    Chip("RTX 5090", ("RTX 5090",), "120", 170, 2.41e9, 209.5e12, 1.792e12, 32, 1, 2, 100 << 10, 48, 24, 2.41e9),
)


def chip_of(device_name: str) -> Chip | None:
    """The chip of a device name such as "NVIDIA H100 80GB HBM3", or None."""
    return next((chip for chip in CHIPS if all(mark in device_name for mark in chip.marks)), None)
