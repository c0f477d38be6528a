"""One training at a time in a run's folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import psutil

from fastgen.train.files import cannot_write, make_folder

try:
    import fcntl
except ImportError:  # Windows: only the text of the file is used
    fcntl = None  # type: ignore[assignment]

NAME = ".fastgen-lock"
TRIES = 100
CLOCK = 2.0  # seconds by which two readings of when a process started may differ
HELD_BY_ANOTHER = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)
NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)

_held: dict[int, Path] = {}
"""Descriptors of locked files of this process."""


@dataclass(frozen=True)
class Owner:
    """A process that trains. started: its start in seconds since 1970, to distinguish it from a later process with the
    same pid. since: when it took the lock, for messages."""

    pid: int
    host: str
    started: float
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context in which no other training that uses this lock writes to the folder, which is created if missing.

    The operating system's lock (flock) on a file in the folder ends with the process; on NFS it holds between hosts.
    Child processes don't inherit it. The file names the owner, and is removed at the end. Where the file system has no
    locks only the file counts: an owner on this host is checked for whether it still runs, one on another host is
    assumed to run.

    Raises:
        FileExistsError: another process holds the lock; names its pid and host.
        OSError: the folder can't be created, or not written to.
    """
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    path, owner = folder / NAME, os.getpid()
    try:
        descriptor = _take(path)
        try:
            yield
        finally:
            if os.getpid() == owner:  # not a child that runs on from here
                with contextlib.suppress(OSError):
                    if _is_at(path, descriptor):
                        path.unlink()
                _drop(descriptor)
    finally:
        if os.getpid() == owner:
            with contextlib.suppress(OSError):  # an unsuccessful run leaves no empty folders
                for made in missing:
                    made.rmdir()


def check_held(folder: Path) -> None:
    """Raises FileExistsError where the folder was removed and locked by another process since this one locked it."""
    path = folder / NAME
    for descriptor, held in _held.items():
        if held == path and path.exists() and not _is_at(path, descriptor):
            other = os.open(path, os.O_RDONLY)
            try:
                raise _busy(path, _read(other), ": the folder was removed while this process trained in it")
            finally:
                os.close(other)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _take(path: Path) -> int:
    """The descriptor of the locked file."""
    for _ in range(TRIES):
        make_folder(path.parent)
        try:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
            descriptor = os.open(path, flags, 0o644)
        except FileNotFoundError:  # another process removed the folder that it had made
            continue
        except OSError as error:
            raise cannot_write(path, error) from error
        _held[descriptor] = path
        try:
            if _lock(path, descriptor):
                return descriptor
        except BaseException:
            _drop(descriptor)
            raise
        _drop(descriptor)  # the file was removed between opening and locking
    raise _busy(path, None)


def _lock(path: Path, descriptor: int) -> bool:
    """Lock the open file and write the owner into it; False where it is no longer the file at ``path``."""
    exclusive = True
    if fcntl is None:
        exclusive = False
    else:
        try:
            _flock(descriptor)
        except OSError as error:
            if error.errno in HELD_BY_ANOTHER:
                raise _busy(path, _read(descriptor)) from error
            if error.errno not in NO_LOCKS_HERE:
                raise cannot_write(path, error) from error
            exclusive = False
    if not _is_at(path, descriptor):
        return False
    before, me = _read(descriptor), _me()
    another = before is not None and (before.pid, before.host) != (me.pid, me.host)
    if before and another and _runs(before, me, otherwise=not exclusive):
        note = "" if before.host == me.host else f"; if it is gone, remove {path}"
        raise _busy(path, before, note)
    try:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, (json.dumps(asdict(me)) + "\n").encode())
        os.fsync(descriptor)
    except OSError as error:
        raise cannot_write(path, error) from error
    return True


def _flock(descriptor: int) -> None:
    """Take the lock. A child forked a moment ago may still hold the lock of a process that has ended."""
    for _ in range(TRIES):
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _read(descriptor) if error.errno in HELD_BY_ANOTHER else None
            if owner is None or _runs(owner, _me(), otherwise=True):
                raise
        time.sleep(0.02)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _drop(descriptor: int) -> None:
    _held.pop(descriptor, None)
    os.close(descriptor)


def _busy(path: Path, owner: Owner | None, note: str = "") -> FileExistsError:
    who = str(owner) if owner else "another process"
    return FileExistsError(f"{path.parent}: expected a folder that no training uses, got one in use by {who}{note}")


def _me() -> Owner:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Owner(os.getpid(), socket.gethostname(), psutil.Process().create_time(), now)


def _read(descriptor: int) -> Owner | None:
    """The owner that the file names; None if it can't be parsed."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        found = json.loads(os.read(descriptor, 4096))
        return Owner(int(found["pid"]), str(found["host"]), float(found["started"]), str(found["since"]))
    except (KeyError, OSError, TypeError, ValueError):
        return None


def _runs(owner: Owner, me: Owner, *, otherwise: bool) -> bool:
    """Whether the owner still runs; ``otherwise`` for an owner on another host, which can't be checked."""
    if owner.host != me.host:
        return otherwise
    try:
        process = psutil.Process(owner.pid)
        same = abs(process.create_time() - owner.started) < CLOCK
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.AccessDenied:
        return True
    except (psutil.Error, ValueError):
        return False


def _forget() -> None:
    """Close the lock in a child process (a data-loading worker), which would keep it when its parent dies."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
