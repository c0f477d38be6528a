"""Writes the predicted times of the attention kernels. Predicted, not measured.

usage: python -m benchmarks.model [--arch 90a ...] [--cubins FOLDER] [--hopper]
Compiles the bfloat16 kernels for each architecture (about two CPU minutes each), and writes predictions.json and
predictions.md beside this file. No GPU is needed. --hopper: only csrc/attention/sm90; the rest stays as it is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.model import calibration, estimates, hopper, hopper_derivatives, kernels, tables
from benchmarks.model.chips import CHIPS
from tests import compile_check

HERE = Path(__file__).resolve().parent


def commit() -> str:
    """The commit of the sources, with "+" where csrc/ has changes."""
    done = subprocess.run(
        ["git", "rev-parse", "--short=10", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "../../csrc"], cwd=HERE, check=False).returncode
    return done.stdout.strip() + ("+" if changed == 1 else "") if done.returncode == 0 else "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", help="for example 90a; may be given repeatedly. Default: all")
    parser.add_argument("--cubins", type=Path, default=compile_check.ROOT / "build" / "model", help="kept between runs")
    parser.add_argument("--hopper", action="store_true", help="only the kernels of csrc/attention/sm90")
    arguments = parser.parse_args()
    nvcc = compile_check.find_nvcc()
    if nvcc is None:
        print("nvcc was not found (CUDA_HOME, PATH, or pip install cuda-toolkit[nvcc,...])", file=sys.stderr)
        return 1
    path = HERE / "predictions.json"
    if arguments.hopper:
        data = json.loads(path.read_text())
    else:
        found = {}
        for arch in arguments.arch or sorted({chip.arch for chip in CHIPS}):
            found[arch] = kernels.compiled(arch, arguments.cubins)
            print(f"sm_{arch}: {len(found[arch])} kernels", file=sys.stderr)
        data = {
            "what": "predicted, not measured",
            "nvcc": kernels.compiler_version(nvcc),
            "commit": commit(),
            "dtype": "bfloat16",
            "calibration": calibration.rows(),
            "kernels": tables.kernel_rows(found),
            "predictions": tables.prediction_rows(found),
            "estimates": estimates.rows(found),
        }
    of_warpgroups = kernels.compiled_hopper(arguments.cubins)
    data |= hopper.rows([one for one in of_warpgroups if one.name == "forward"])
    data |= hopper_derivatives.rows(of_warpgroups)
    path.write_text(tables.text_of(data))
    (HERE / "predictions.md").write_text("\n".join(tables.lines(data)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
