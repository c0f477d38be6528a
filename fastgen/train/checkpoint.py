"""One safetensors file with everything a run needs to go on: tensors, and a JSON header in its metadata."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from fastgen.train.files import write_whole

FORMAT = "fastgen-checkpoint"


@dataclass(frozen=True)
class Header:
    """How a run was made: constant while it trains. ``data`` holds the images' source and fingerprint."""

    model: str
    model_config: dict[str, Any]
    train_config: dict[str, Any]
    data: dict[str, str]


def save_checkpoint(path: Path, header: Header, tensors: dict[str, Tensor]) -> None:
    """Write the file whole, or leave the old one. Tensors may be on any device."""
    metadata = {"format": FORMAT, "header": json.dumps(asdict(header))}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, safetensors.torch.save(contiguous, metadata))


def load_checkpoint(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """Read a file that ``save_checkpoint`` wrote; tensors come on the CPU. Never runs code from the file.

    Raises:
        FileNotFoundError: no such file. ValueError: cut short, damaged, or not one of ours; names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a fastgen checkpoint, got a path where there is no file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a fastgen checkpoint, got a file that is cut short or damaged ({error})"
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a fastgen checkpoint, got a safetensors file of another program")
    try:
        header = Header(**json.loads(metadata["header"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a fastgen checkpoint of this version, got a header with {error}") from error
    return header, tensors
