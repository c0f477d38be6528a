"""Run a CUDA kernel of your own on the CPU, in the emulator that hunts races, and see a missing barrier found.

The kernel is in emulated_kernel.cu, ordinary CUDA that reaches the hardware through csrc/device/. It compiles with g++
against the emulator's host twins; no GPU and no nvcc are needed. The emulator runs its threads in an order chosen by a
seed, and checks every access to memory.

    python examples/emulated_kernel.py --steps 20
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.emulator import build  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="schedules to run the kernel under")
    options = parser.parse_args()
    reason = build.why_not()
    if reason is not None:
        raise SystemExit(f"the emulator cannot be built here: {reason}")
    emulator = build.module_of(ROOT / "examples" / "emulated_kernel.cu")

    rows, columns, threads = 3, 200, 128
    matrix = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)

    def row_sum() -> np.ndarray:
        out = np.empty(rows, np.float32)  # shape and dtype of the result
        return emulator.run("row_sum", (rows, 1, 1), (threads, 1, 1), 0, [matrix], out, False, [columns])

    for seed in range(options.steps):
        emulator.configure(seed=seed)
        np.testing.assert_allclose(row_sum(), matrix.sum(axis=1), rtol=1e-4, atol=1e-4)
    print(f"{options.steps} schedules: right results, no finding")

    # Leave out each synchronizing call in turn: the emulator must notice.
    for site in emulator.sites():
        for seed in range(40):
            emulator.configure(seed=seed, leave_out=site)
            try:
                row_sum()
            except emulator.Finding as finding:
                print(f"\nwithout {site}:\n{finding}")
                break
        else:
            raise SystemExit(f"{site} can be left out unnoticed")


if __name__ == "__main__":
    main()
