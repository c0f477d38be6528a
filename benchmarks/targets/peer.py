"""Holds PyTorch to the instructions that ``FASTGEN_CPU`` chooses for fastgen's kernels."""

from __future__ import annotations

import os

SETTINGS = {
    "generic": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {},
}
"""By level. The libraries read these variables when they are first used: before torch is imported is early enough."""


def hold_pytorch() -> None:
    os.environ.update(SETTINGS.get(os.environ.get("FASTGEN_CPU", ""), {}))
