"""The user's image files as items with names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath

from fastgen.data import Items, TensorItems, image_paths, read_images
from fastgen.train.evaluation import Thinned


class FileItems(TensorItems):
    """An image file, all images below a folder in the order of their names, or those of an array, IDX file or archive;
    resized.

    Args:
        path: the file or folder.
        names: of the tensors of a batch, all of which hold the images.
        image_size, channels: as of ``read_images``.

    Attributes:
        files: path of each image, relative to the folder, with "/"; [] where one file holds several images.
        stems: the same without the suffix, which stays where two would be the same (a.png, a.jpg).

    Raises:
        FileNotFoundError, ValueError: no such path, or no images. OSError: a file that can't be read.
    """

    def __init__(self, path: Path, names: Sequence[str], image_size: int, channels: int) -> None:
        stack = read_images(path, image_size, channels)
        paths = _paths(path)
        paths = paths if len(paths) == len(stack) else []  # files of arrays hold many images
        self.files = [file.relative_to(path if path.is_dir() else path.parent).as_posix() for file in paths]
        stems = [PurePath(file).with_suffix("").as_posix() for file in self.files]
        count = Counter(stem.lower() for stem in stems)
        pairs = zip(stems, self.files, strict=True)
        self.stems = [stem if count[stem.lower()] == 1 else file for stem, file in pairs]
        super().__init__(dict.fromkeys(names, stack), dict.fromkeys(names, 255.0))


def file_names(items: Items) -> list[str] | None:
    """The ``files`` of ``FileItems``; None for items without files of their own."""
    return items.files if isinstance(items, FileItems) and items.files else None


def _paths(path: Path) -> list[Path]:
    try:
        return image_paths(path)
    except (OSError, ValueError):  # another format, which ``read_images`` has read
        return []


def output_names(items: Items | None, n: int) -> list[str] | None:
    """Names of output files, without a suffix, for n of the items, evenly spaced, after their own files; or None."""
    if not isinstance(items, FileItems) or not items.files:
        return None
    return [items.stems[index] for index in Thinned(items, n).chosen.tolist()]
