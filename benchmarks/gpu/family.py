"""One family of tests in this process: the first calls, then its tests on the GPU.

usage: python -m benchmarks.gpu.family FOLDER FAMILY [--limit SECONDS] [--only NODE]
Run by benchmarks.gpu.check in a process of its own, because an illegal access poisons a process.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import smoke
from benchmarks.gpu.session import REHEARSAL, ROOT, Session


class Family(NamedTuple):
    """Tests of a family: files, and what has to be in a test's name. ``seconds``: at most."""

    files: tuple[str, ...]
    select: str
    seconds: int


FAMILIES = {
    "device layer": Family(("tests/emulator/test_device_layer.py",), "cuda", 50),
    "latent": Family(("tests/ops/test_latent.py", "tests/ops/test_latent_numerics.py"), "compiled and cuda", 30),
    "forward": Family(("tests/ops/test_attention_numerics.py", "tests/ops/test_softcap.py"), "compiled and cuda", 40),
    "backward": Family(
        ("tests/ops/test_attention_grid.py", "tests/ops/test_attention_cuda.py"),
        "(compiled and cuda or test_cuda) and not second", 60,
    ),
    "second order": Family(
        ("tests/ops/test_attention_grid.py", "tests/ops/test_attention_cuda.py"),
        "(compiled and cuda or test_cuda) and second", 60,
    ),
    "projection": Family(
        ("tests/ops/test_projection.py", "tests/ops/test_projection_kernels.py", "tests/ops/test_projection_cuda.py"),
        "cuda and not torch-cuda", 30,
    ),
    "layers": Family(
        ("tests/ops/test_packed.py", "tests/nn/test_recurrent.py", "tests/losses/test_penalties_precision.py"),
        "cuda and not torch-cuda", 30,
    ),
}  # fmt: skip
"""In the order in which a session runs them: each needs those before it."""

REHEARSED = 2  # tests of each file in a rehearsal


class Lines:
    """A plugin of pytest: writes failures when they happen, counts, and stops the tests when the time is over."""

    def __init__(self, session: Session, family: str) -> None:
        self.session, self.family = session, family
        self.counts: dict[str, int] = {}
        self.stopped = False
        self.tests: Any = None

    def pytest_sessionstart(self, session: Any) -> None:
        self.tests = session

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        if REHEARSAL:
            taken: dict[str, int] = {}
            for item in list(items):
                file = item.nodeid.partition("::")[0]
                taken[file] = taken.get(file, 0) + 1
                if taken[file] > REHEARSED:
                    items.remove(item)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        current_file(self.session.folder).write_text(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if self.session.left <= 0 and not self.stopped:
            self.stopped, self.tests.shouldstop = True, "the time is over"
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] = self.counts.get(report.outcome, 0) + 1
        if report.outcome == "failed":
            self.session.write("failure", family=self.family, test=report.nodeid, text=report.longreprtext[-2000:])


def current_file(folder: Path) -> Path:
    """The name of the test that runs now: of the one that crashed, afterwards."""
    return folder / "current-test.txt"


def selection(family: Family, only: str = "") -> list[str]:
    """Arguments of pytest."""
    if only:
        return ["-q", "-p", "no:cacheprovider", only]
    select = family.select
    if REHEARSAL:
        select = select.replace("compiled and cuda", "emulated").replace("cuda and not torch-cuda", "emulated")
        select = "emulated" if select == "cuda" else select.replace("or test_cuda", "or emulated")
    return ["-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", select, *family.files]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--limit", type=float, default=60)
    parser.add_argument("--only", default="", help="this test alone")
    arguments = parser.parse_args()
    session = Session(arguments.folder, arguments.limit)
    current_file(session.folder).write_text("first calls")
    failures = 0 if arguments.only else smoke.run(session, arguments.family)
    family = FAMILIES[arguments.family]
    present = [file for file in family.files if (ROOT / file).is_file()]
    if importlib.util.find_spec("pytest") is None:
        session.write("family", family=arguments.family, passed=failures == 0, note="pytest is not installed: no tests")
        return 1 if failures else 0
    import pytest

    # After -k and -m have deselected.
    Lines.pytest_collection_modifyitems = pytest.hookimpl(trylast=True)(Lines.pytest_collection_modifyitems)  # type: ignore[method-assign]
    lines = Lines(session, arguments.family)
    code = int(pytest.main(selection(family._replace(files=tuple(present)), arguments.only), plugins=[lines]))
    nothing = code == 5 and REHEARSAL  # no test of the family runs in the emulator
    fine = not lines.counts.get("failed") if lines.stopped else code == 0 or nothing
    passed = failures == 0 and fine
    session.write(
        "family", family=arguments.family, passed=passed, complete=not lines.stopped, first_calls_failed=failures,
        tests=lines.counts,
    )  # fmt: skip
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
