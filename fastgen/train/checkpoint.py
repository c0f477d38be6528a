"""Checkpoints: one safetensors file with all that resuming a run needs, tensors and a JSON header in its metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastgen.batch import current_names
from fastgen.data._files import cannot_read, check_file
from fastgen.models import MODELS
from fastgen.train.files import write_whole

FORMAT = "fastgen-checkpoint"


@dataclass(frozen=True)
class Header:
    """Settings of a run, constant while it trains. fingerprint: that of its dataset."""

    model: str
    model_config: dict[str, Any]
    train_config: dict[str, Any]
    data_config: dict[str, Any]
    fingerprint: str


def save_checkpoint(path: Path, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Write the file atomically. Tensors may be on any device.

    Raises:
        OSError: it can't be written (a full disk); names the file. The previous checkpoint is kept.
    """
    text = json.dumps(asdict(header))
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "header": text, "digest": _digest(text, contiguous)}
    write_whole(path, safetensors.torch.save(contiguous, metadata))


def load_checkpoint(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """Read a file that ``save_checkpoint`` wrote; tensors are on the CPU. Never runs code from the file.

    Raises:
        FileNotFoundError: no such file. OSError: it can't be read. ValueError: truncated, changed, or no checkpoint.
        Each names the file.
    """
    check_file(path, "a fastgen checkpoint")
    try:
        open(path, "rb").close()  # a clearer error than the library's
    except OSError as error:
        raise cannot_read(path, error) from error
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
    text = metadata.get("header", "")
    if metadata.get("digest") != _digest(text, tensors):
        raise ValueError(f"{path}: expected a fastgen checkpoint, got one that was changed since (its digest differs)")
    try:
        header = json.loads(text)
        known = {field.name for field in fields(Header)}
        if set(header) != known:
            raise ValueError(f"{', '.join(sorted(set(header) ^ known))} missing or unknown")
        model_class, options = MODELS.get(header["model"]), header["model_config"]
        if model_class is not None and isinstance(options, dict):
            header["model_config"] = current_names(model_class.config_class, options)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a fastgen checkpoint of this version, got a header with {error}") from error
    return Header(**header), tensors


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, shapes, contents and the header: detects accidental damage, no attacker."""
    total = hashlib.blake2b(header.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
