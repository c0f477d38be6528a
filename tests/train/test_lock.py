"""Only one training at a time writes to a run's folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastgen.cli import main
from fastgen.train.engine import Engine
from fastgen.train.lock import NAME, locked
from tests.train import processes
from tests.train.test_resume import after_step

Main = Callable[..., int]
Words = Callable[..., list[str]]


def holder(folder: Path) -> tuple[Any, Connection]:
    """A process that holds the lock, and has a child as DataLoader has; and what tells that it does."""
    ours, theirs = processes.context().Pipe()
    process = processes.context().Process(target=processes.hold_lock, args=(folder, theirs))
    process.start()
    assert ours.poll(30)
    assert ours.recv() == "locked"
    return process, ours


def test_a_second_training_is_refused_with_the_process_that_has_the_folder(tmp_path: Path) -> None:
    process, _ = holder(tmp_path)
    try:
        who = f"process {process.pid} on {re.escape(socket.gethostname())} since 20"
        with pytest.raises(FileExistsError, match=f"expected a folder that no training uses, got one in use by {who}"):
            locked(tmp_path).__enter__()
    finally:
        process.kill()
        process.join()


def test_a_lock_is_free_at_once_when_its_process_is_killed_although_a_worker_lives_on(tmp_path: Path) -> None:
    process, pipe = holder(tmp_path)
    worker = pipe.recv()
    try:
        process.kill()
        process.join()
        assert psutil.pid_exists(worker)
        assert (tmp_path / NAME).exists()
        with locked(tmp_path):
            assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
        assert not list(tmp_path.iterdir())
    finally:
        os.kill(worker, signal.SIGKILL)


def text(pid: int, *, host: str = "", later: float = 0.0) -> str:
    """What a process writes that began ``later`` than the one that now has its number."""
    began = psutil.Process(pid).create_time() if psutil.pid_exists(pid) else 0.0
    return json.dumps({"pid": pid, "host": host or socket.gethostname(), "started": began + later, "since": "then"})


DEAD_PID = 2**22 + 1  # above the largest number of a process


@pytest.mark.parametrize(
    ("before", "has_locks", "refused"),
    [
        (text(DEAD_PID), True, False),
        (text(DEAD_PID), False, False),
        (text(os.getppid(), later=60.0), False, False),  # its number was given to another process since
        (text(os.getppid()), False, True),
        (text(os.getppid()), True, True),  # a file system that grants every lock
        (text(1, host="elsewhere"), False, True),
        (text(1, host="elsewhere"), True, False),  # the lock itself holds between hosts
        ("", False, False),
        ('{"pid": "x"}', False, False),
    ],
)
def test_a_lock_left_behind_is_taken_over_but_not_that_of_a_process_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, has_locks: bool, refused: bool
) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / NAME).write_text(before)
    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    if refused:
        with pytest.raises(FileExistsError, match=r"got one in use by process [0-9]+ on .* since then") as caught:
            locked(tmp_path).__enter__()
        assert (f"if it is gone, remove {tmp_path / NAME}" in str(caught.value)) == ("elsewhere" in before)
        assert (tmp_path / NAME).read_text() == before
    else:
        with locked(tmp_path):
            assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
        assert not list(tmp_path.iterdir())


def test_training_is_refused_in_a_folder_in_use_and_sampling_is_not(
    fit: Main, tmp_path: Path, error_line: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert fit(steps=1) == 0
    before = {file.name: file.read_bytes() for file in run.glob("[!.]*.*")}
    monkeypatch.setattr(
        "fastgen.train.settings.load_data", lambda *args: pytest.fail("data were loaded before the lock")
    )
    with locked(run):
        for options in (["--resume"], ["--overwrite"]):
            assert fit(*options, steps=2) == 1
            assert f"got one in use by process {os.getpid()} on " in error_line()
        assert main(["sample", str(run), "--n", "1", "--out", str(tmp_path / "a.png")]) == 0
        assert before == {file.name: file.read_bytes() for file in run.glob("[!.]*.*")}


def test_a_run_whose_folder_was_removed_and_taken_by_another_writes_no_more(
    fit: Main, tmp_path: Path, error_line: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    other: list[Any] = []

    def replaced(engine: Engine) -> None:
        shutil.rmtree(run)
        run.mkdir()
        other.append(locked(run))
        other[0].__enter__()

    after_step(monkeypatch, 2, replaced)
    assert fit("--log-every", "1", steps=4) == 1
    line = error_line()
    assert f"got one in use by process {os.getpid()} on " in line
    assert "the folder was removed while this process trained in it" in line
    assert [path.name for path in run.iterdir()] == [NAME]
    other[0].__exit__(None, None, None)
    assert not list(run.iterdir())


def test_a_training_that_fails_at_the_start_leaves_no_folder(fit: Main, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    for name in ("new/deep", "kept/new", "kept"):
        assert fit("--data", str(tmp_path / "nothing"), name=name) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert not list((tmp_path / "kept").iterdir())


def test_of_two_trainings_that_start_at_once_one_is_refused(
    words: Words, start: Callable[..., Any], tmp_path: Path
) -> None:
    started = [start(words("--log-every", "1", steps=40)) for _ in range(2)]
    for process in started:
        process.join(timeout=60)
    assert sorted(process.exitcode for process in started) == [0, 1], (tmp_path / "output").read_text()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["part"] == "train"] == [*range(1, 41)]
    assert not (tmp_path / "run" / NAME).exists()
