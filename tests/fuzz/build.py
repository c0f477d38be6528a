"""The package with a library of the CPU that AddressSanitizer and UBSan watch, and runs of the fuzzer on it.

python -m tests.fuzz.build --calls 100000 builds it below build/sanitized where that is out of date, and passes the
arguments on to ``python -m tests.fuzz``. Tensors of PyTorch come from an allocator that ASan replaces, so accesses of
fastgen's kernels beyond them are found; those of PyTorch's own kernels are not instrumented, and are found by the
pages around the fuzzer's tensors.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "sanitized"
SANITIZERS = "address,undefined"


def _compiler() -> str:
    return os.environ.get("CXX", "g++").split(" ")[0]


def _runtime(name: str) -> str | None:
    """The path of a sanitizer's shared library; None where the compiler has none."""
    if shutil.which(_compiler()) is None:
        return None
    done = subprocess.run([_compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    path = done.stdout.strip()
    return path if Path(path).is_absolute() and Path(path).exists() else None


def why_not() -> str | None:
    """None where the library can be built and watched, else the reason."""
    if sys.platform != "linux":
        return "the sanitizers are preloaded, as Linux does it"
    missing = [name for name in ("libasan.so", "libubsan.so") if _runtime(name) is None]
    return f"{_compiler()} has no {' and no '.join(missing)}" if missing else None


def build() -> Path:
    """The folder to import fastgen from."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(OUT)]
    environment = {**os.environ, "FASTGEN_BUILD": "cpu", "FASTGEN_SANITIZE": SANITIZERS}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the sanitized build failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    # The tests import fastgen from where they are, so they stand beside it.
    tests = OUT / "tests"
    shutil.rmtree(tests, ignore_errors=True)
    shutil.copytree(ROOT / "tests" / "fuzz", tests / "fuzz")
    return OUT


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """``python -m tests.fuzz``; on a process that ended, its output and the log say where and in which call."""
    options = "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=1024"
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{_runtime('libasan.so')} {_runtime('libubsan.so')}",
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(folder),
    }
    log = folder / "call.log"
    command = [sys.executable, "-m", "tests.fuzz", "--log", str(log), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    last = log.read_text() if log.is_file() else ""
    if "results of" not in done.stdout:
        done.stderr += f"\nThe process ended with {done.returncode}, in this call:\n{last}"
    return done


def main() -> int:
    reason = why_not()
    if reason is not None:
        print(f"tests.fuzz.build: {reason}", file=sys.stderr)
        return 2
    done = run(sys.argv[1:], build())
    print(done.stdout + done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
