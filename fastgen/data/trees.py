"""Files below a folder, or in a zip or tar archive, which is read in place: nothing is unpacked to disk."""

from __future__ import annotations

import os
import tarfile
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from fastgen.data._files import cannot_read, read_bytes
from fastgen.data.images import MEMORY_LIMIT, EncodedImages

Member = TypeVar("Member")

SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini"))
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


class Tree(ABC):
    """Files by their paths, which are relative and sorted by their parts.

    Attributes:
        name: the source as the user wrote it.
    """

    name: str
    files: Sequence[Path]

    @abstractmethod
    def read(self, file: Path) -> bytes:
        """The contents of one of ``files``. OSError, ValueError: it can't be read; names it."""

    def place(self, file: Path) -> str:
        """A file, for messages."""
        return str(Path(self.name) / file)


@dataclass(frozen=True)
class FolderTree(Tree):
    """A folder, without its hidden files and those that Windows leaves in folders. Links are followed."""

    name: str
    path: Path
    files: Sequence[Path]

    def read(self, file: Path) -> bytes:
        return read_bytes(self.path / file)

    def place(self, file: Path) -> str:
        return str(self.path / file)


@dataclass(frozen=True)
class ZipTree(Tree):
    """A zip archive. members: the name of each file in it."""

    name: str
    path: Path
    files: Sequence[Path]
    members: dict[Path, str]

    def read(self, file: Path) -> bytes:
        try:
            return _opened_zip(self.path).read(self.members[file])
        except OSError as error:
            raise cannot_read(self.path, error) from error
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
            raise ValueError(f"{self.place(file)}: expected to unpack it, got: {error}") from error


@dataclass(frozen=True)
class TarTree(Tree):
    """A tar archive. members: where a file begins in a plain one, and its size; the contents in a compressed one; the
    target of a link to something that is not in it."""

    name: str
    path: Path
    files: Sequence[Path]
    members: dict[Path, tuple[int, int] | bytes | str]

    def read(self, file: Path) -> bytes:
        found = self.members[file]
        if isinstance(found, bytes):
            return found
        if isinstance(found, str):
            raise ValueError(f"{self.place(file)}: expected a file, got a link to {found}, which is not in the archive")
        try:
            with open(self.path, "rb") as archive:
                archive.seek(found[0])
                return archive.read(found[1])
        except OSError as error:
            raise cannot_read(self.path, error) from error


@dataclass(frozen=True)
class TreeImages(EncodedImages):
    """Images among the files of a tree. half: 0 or 1, the left or right half of each image; None: all of it."""

    tree: Tree
    paths: Sequence[Path]
    half: int | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return self.tree.place(self.paths[i])

    def read(self, i: int) -> bytes:
        return self.tree.read(self.paths[i])


def folder_tree(path: Path) -> FolderTree:
    """Raises OSError for a folder that can't be read; names it."""
    return FolderTree(str(path), path, files_below(path))


def files_below(folder: Path) -> list[Path]:
    """Paths relative to the folder, sorted by their parts. Links are followed; hidden files and folders, and those that
    Windows leaves in folders, left out.

    Raises:
        OSError: a folder that can't be read; names it.
    """
    found: list[Path] = []
    above: dict[str, frozenset[str]] = {}  # real paths of a folder and of those above it
    for here, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        real, parents = os.path.realpath(here), above.get(os.path.dirname(here), frozenset())
        if real in parents:  # a link to a folder above itself
            folders.clear()
            continue
        above[here] = parents | {real}
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(here, name).relative_to(folder) for name in files if not _is_system_file(name)]
    return sorted(found, key=lambda path: path.parts)


def is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVES)


def archive_tree(path: Path) -> Tree:
    """The files of an archive, without a folder that contains all of them.

    Raises:
        ValueError: no archive, a damaged one, or a compressed tar with more than ``MEMORY_LIMIT`` bytes.
        OSError: it can't be read.
    """
    try:
        return _zip_tree(path) if path.suffix.lower() == ".zip" else _tar_tree(path)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise cannot_read(path, error) from error
        raise ValueError(f"{path}: expected a zip or tar archive, got one that fails: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    """tarfile lists the error of each method of compression in a line of its own."""
    return str(error).partition("\n")[0].rstrip(":") or type(error).__name__


def _zip_tree(path: Path) -> ZipTree:
    members: dict[Path, str] = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if not entry.is_dir() and _is_listed(entry.filename):
                # Some programs for Windows write backslashes, which the format does not allow.
                members[Path(entry.filename.replace("\\", "/"))] = entry.filename
    renamed = _without_common_folder(members)
    return ZipTree(str(path), path, sorted(renamed, key=lambda file: file.parts), renamed)


def _tar_tree(path: Path) -> TarTree:
    members: dict[Path, tuple[int, int] | bytes | str] = {}
    links: list[tarfile.TarInfo] = []
    total = 0
    plain = path.suffix.lower() == ".tar" and _is_plain_tar(path)
    with tarfile.open(path, "r:" if plain else "r:*") as archive:
        for entry in archive:
            is_link = entry.islnk() or entry.issym()
            if not (entry.isfile() or is_link) or not _is_listed(entry.name):
                continue
            if is_link:
                links.append(entry)
                continue
            if plain:
                members[Path(entry.name)] = (entry.offset_data, entry.size)
                continue
            total += entry.size
            if total > MEMORY_LIMIT:
                raise ValueError(
                    f"{path}: expected at most {MEMORY_LIMIT >> 20:,} MiB in a compressed tar, which is read into "
                    "memory, got more: a .zip or a plain .tar may be larger"
                )
            file = archive.extractfile(entry)
            members[Path(entry.name)] = file.read() if file else b""
    _add_links(links, members)
    renamed = _without_common_folder(members)
    return TarTree(str(path), path, sorted(renamed, key=lambda file: file.parts), renamed)


def _add_links(links: Sequence[tarfile.TarInfo], members: dict[Path, tuple[int, int] | bytes | str]) -> None:
    """Adds what the hard and symbolic links of a tar archive stand for: files, or the files of a folder.

    A link whose target is not in the archive is added with the target's name; reading it is an error.
    """
    targets = {}
    for link in links:
        folder = "" if link.islnk() else os.path.dirname(link.name)
        targets[Path(link.name)] = Path(os.path.normpath(os.path.join(folder, link.linkname)))
    for of_folder in (False, True):
        for _ in range(len(targets)):  # a link may lead to another one
            before = len(targets)
            for name, target in list(targets.items()):
                if target in members:
                    members[name] = members[target]
                    del targets[name]
                elif of_folder and (inside := [file for file in members if file.is_relative_to(target)]):
                    if not name.is_relative_to(target):  # a link to a folder above itself is left out, as on disk
                        members |= {name / file.relative_to(target): members[file] for file in inside}
                    del targets[name]
            if len(targets) == before:
                break
    for name, target in targets.items():
        members[name] = str(target)


def _is_plain_tar(path: Path) -> bool:
    try:
        tarfile.open(path, "r:").close()
    except tarfile.ReadError:
        return False
    return True


def _without_common_folder(members: dict[Path, Member]) -> dict[Path, Member]:
    while members and all(len(file.parts) > 1 for file in members) and len({file.parts[0] for file in members}) == 1:
        members = {Path(*file.parts[1:]): found for file, found in members.items()}
    return members


def _is_listed(name: str) -> bool:
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") and part != "." for part in parts) or "__MACOSX" in parts
    return bool(parts) and not hidden and not _is_system_file(parts[-1])


def _is_system_file(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def _raise(error: OSError) -> None:
    raise cannot_read(error.filename, error) from error


_LOCAL = threading.local()


def _opened_zip(path: Path) -> zipfile.ZipFile:
    """The archive, opened once by each thread of each process: a forked one would share the position in the file."""
    key = (path, os.getpid())
    if getattr(_LOCAL, "key", None) != key:
        _LOCAL.key, _LOCAL.archive = key, zipfile.ZipFile(path)
    archive: zipfile.ZipFile = _LOCAL.archive
    return archive
