"""The first call of a session: build, and correctness of each family.

usage: python -m benchmarks.gpu.check FOLDER [--limit 240]
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu import prebuilt
from benchmarks.gpu.family import FAMILIES, current_file
from benchmarks.gpu.session import REHEARSAL, ROOT, Session, machine

SANITIZER_SECONDS = 60
CAPABILITY = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"


def run(command: list[str], seconds: float, log: Path, **environment: str) -> int | None:
    """The exit code of a command whose output is appended to ``log``; None if it was ended after ``seconds``."""
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=file, env={**os.environ, **environment}, start_new_session=True
        )
        try:
            return process.wait(timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def architecture() -> str:
    """TORCH_CUDA_ARCH_LIST for the device."""
    done = subprocess.run([sys.executable, "-c", CAPABILITY], capture_output=True, text=True, check=False)
    found = done.stdout.strip() or "9.0"
    return "9.0a" if found == "9.0" else found


def build(session: Session) -> bool:
    """Prebuilt libraries of these sources, or a build; unit kernels of the device layer beside it."""
    log, start = session.folder / "build.log", time.monotonic()
    folder, reasons = (None, ["a rehearsal"]) if REHEARSAL else prebuilt.take()
    units = None
    if not REHEARSAL:
        code = "from tests.emulator import build; build.why_not_cuda() or build.cuda_module()"
        units = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=log.open("a"), stderr=subprocess.STDOUT)
    passed = True
    if folder is None:
        environment = {"FASTGEN_BUILD": "cpu"} if REHEARSAL else {"FASTGEN_BUILD": "cuda"}
        if not REHEARSAL:
            environment["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or architecture()
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        passed = run(command, session.left, log, **environment) == 0
    seconds = time.monotonic() - start
    if REHEARSAL:
        code = "from tests.emulator import build; build.build()"
        passed &= run([sys.executable, "-c", code], 1200, log) == 0
    session.write(
        "build", passed=passed, prebuilt=str(folder) if folder else None, why_not_prebuilt=reasons,
        seconds=round(seconds, 1), log="" if passed else log.read_text()[-2000:],
    )  # fmt: skip
    if units is not None:
        try:
            units.wait(timeout=max(session.left / 3, 1))
        except subprocess.TimeoutExpired:
            units.kill()
    return passed


def sanitize(session: Session, family: str, test: str) -> None:
    """The first failing test under compute-sanitizer, if that is installed."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None or session.left < 10:
        session.write(
            "sanitizer", family=family, test=test, note="compute-sanitizer was not found" if tool is None else "no time"
        )
        return
    log = session.folder / "sanitizer.log"
    command = [tool, "--tool", "memcheck", "--print-limit", "5", sys.executable, "-m", "benchmarks.gpu.family"]
    command += [str(session.folder), family] + (["--only", test] if "::" in test else [])
    code = run(command, min(SANITIZER_SECONDS, session.left), log)
    session.write("sanitizer", family=family, test=test, code=code, report=log.read_text()[-3000:])


def check(session: Session, family: str) -> bool:
    """Runs one family in a process of its own."""
    start, log = time.monotonic(), session.folder / f"{family.replace(' ', '-')}.log"
    seconds = 600 if REHEARSAL else min(FAMILIES[family].seconds, session.left)
    before = len(session.rows("failure"))
    command = [sys.executable, "-m", "benchmarks.gpu.family", str(session.folder), family, "--limit"]
    command.append(str(max(seconds - 10, 5)))  # its start and its last test take time too
    code = run(command, seconds, log)
    passed = code == 0
    row = {"family": family, "passed": passed, "code": code, "seconds": round(time.monotonic() - start, 1)}
    if not passed:
        # "first calls", or the last test that started: the one that crashed or hung.
        row["last_test"] = current_file(session.folder).read_text()
        row["log"] = log.read_text()[-1500:]
    session.write("process", **row)
    failures = session.rows("failure")[before:]
    if not passed and not session.rows("sanitizer"):
        sanitize(session, family, failures[0]["test"] if failures else str(row["last_test"]))
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=float, default=240, help="seconds for everything")
    parser.add_argument("--family", action="append", choices=FAMILIES, help="default: all")
    arguments = parser.parse_args()
    session = Session(arguments.folder.resolve(), arguments.limit)
    if not build(session):
        print(f"the build failed: {session.folder / 'build.log'}", file=sys.stderr)
        return 1
    session.write("machine", **machine())
    passed = True
    for family in arguments.family or FAMILIES:
        if not REHEARSAL and session.left < 5:
            session.write("process", family=family, passed=False, note="no time left")
            passed = False
            continue
        fine = check(session, family)
        print(f"{family}: {'passed' if fine else 'FAILED'} ({arguments.limit - session.left:.0f} s)", flush=True)
        passed &= fine
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
