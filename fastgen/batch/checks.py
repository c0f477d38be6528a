"""Checks of batches: images, tokens, labels, captions, audio.

Dtypes and shapes are checked in every call. Values are checked only where that does not synchronize: on the CPU, and
not while a call is traced or transformed. Training checks the values of its data once, before it begins, on any device.
Only that check rejects NaN; in a training step NaN makes the loss NaN, and the step is skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.batch.vocabulary import FIRST
from fastgen.checks import require_shape, require_tensor, shape_of
from fastgen.ops.transforms import transforms_active

RANGE_TOLERANCE = 1e-3  # tolerance beyond the ends of a range, for resampling and low precision
NEVER_IGNORED = -(1 << 40)
"""``ignore_index`` of cross-entropies: with torch's default, -100, an invalid target of -100 would have loss 0."""


def can_read_values(tensor: Tensor) -> bool:
    """Whether the values can be read without synchronizing, a graph break or a failing transform."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not transforms_active()
    )


def require_range(name: str, tensor: Tensor, low: float, high: float, meaning: str, hint: str = "") -> None:
    """Raises ValueError where readable values are below low or above high. NaN passes, and makes the result NaN."""
    if not can_read_values(tensor) or not tensor.numel():
        return
    least, largest = (end.item() for end in tensor.detach().aminmax())
    if least < low or largest > high:
        raise ValueError(f"{name}: expected {meaning}, got {least:.4g} to {largest:.4g}{hint}")


def require_images(name: str, images: Tensor, channels: int, size: int) -> None:
    """Raises TypeError, ValueError unless images are (B, channels, size, size), floating, in [0, 1]."""
    require_tensor(name, images)
    if not images.is_floating_point():
        raise TypeError(
            f"{name}: expected a floating-point tensor, got {images.dtype}; pixels are from 0 to 1: divide those of 8"
            " bits by 255"
        )
    require_shape(name, images, (*images.shape[:1], channels, size, size), "(B, C, S, S)")
    _require_some(name, images)
    require_range(
        name,
        images,
        -RANGE_TOLERANCE,
        1 + RANGE_TOLERANCE,
        "pixels in [0, 1]",
        "; scale them, as x / 255 or (x + 1) / 2 would",
    )


def require_tokens(
    name: str, tokens: Tensor, count: int, shape: tuple[int, ...] | None = None, meaning: str = ""
) -> None:
    """Raises TypeError, ValueError unless tokens are int64, of the shape, from 0 to count - 1."""
    require_tensor(name, tokens)
    if tokens.dtype != torch.int64:
        raise TypeError(f"{name}: expected an int64 tensor, got {tokens.dtype}")
    if shape is not None:
        require_shape(name, tokens, shape, meaning)
    require_range(name, tokens, 0, count - 1, f"integers from 0 to {count - 1}")


def require_labels(name: str, labels: Tensor | None, batch: int, classes: int) -> None:
    """Raises TypeError, ValueError unless labels are (batch,) int64, from 0 to classes - 1."""
    if labels is None:
        raise ValueError(f"{name}: expected (B,) int64, got a batch without {name}")
    require_tokens(name, labels, classes, (batch,), "(B,)")


def require_audio(name: str, audio: Tensor, length: int) -> None:
    """Raises TypeError, ValueError unless audio is (B, length), floating, in [-1, 1]."""
    require_tensor(name, audio)
    if not audio.is_floating_point():
        raise TypeError(
            f"{name}: expected a floating-point tensor, got {audio.dtype}; samples are from -1 to 1: divide those of 16"
            " bits by 32768"
        )
    require_shape(name, audio, (*audio.shape[:1], length), "(B, length)")
    _require_some(name, audio)
    require_range(name, audio, -1 - RANGE_TOLERANCE, 1 + RANGE_TOLERANCE, "samples in [-1, 1]")


def require_same_batch(first_name: str, first: Tensor, name: str, tensor: Tensor) -> None:
    """Raises ValueError unless both have the same batch size: a batch of one would broadcast."""
    if len(first) != len(tensor):
        raise ValueError(f"{name}: expected as many items as {first_name}, {len(first)}, got {len(tensor)}")


def _require_some(name: str, tensor: Tensor) -> None:
    if tensor.size(0) == 0:
        raise ValueError(f"{name}: expected at least one item, got shape {shape_of(tensor)}")


def check_batch(kind: str, config: Any, batch: Mapping[str, Tensor]) -> None:
    """Checks a batch of a kind (``KINDS``) against a config.

    Facts that the config does not have are not checked, nor tensors that the batch does not have.

    Raises:
        TypeError, ValueError: dtypes, shapes or values that do not fit; NaN or infinite values.
    """
    for name, tensor in batch.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinite ones")

    def fact(name: str) -> Any:
        return getattr(config, name, None)

    if kind in ("images", "pairs", "domains") and fact("image_size") and fact("channels"):
        for name in ("images", "inputs", "targets", "a", "b"):
            if name in batch:
                channels = fact("input_channels") if name == "inputs" else fact("channels")
                require_images(name, batch[name], channels, fact("image_size"))
    if kind == "images" and fact("classes") and fact("conditional") is not False and "labels" in batch:
        require_labels("labels", batch["labels"], len(batch["images"]), fact("classes"))
    if kind == "images" and fact("captions") and "caption" in batch:
        count = 1 + len(fact("caption_vocabulary"))
        shape = (len(batch["images"]), fact("caption_length"))
        require_tokens("caption", batch["caption"], count, shape, "(B, caption_length)")
    if kind == "text" and fact("vocabulary"):
        require_tokens("tokens", batch["tokens"], len(fact("vocabulary")))
    if kind == "sequences" and fact("vocabulary"):
        for name in ("source", "target"):
            shape = (len(batch["source"]), fact(f"{name}_length"))
            require_tokens(name, batch[name], FIRST + len(fact("vocabulary")), shape, f"(B, {name}_length)")
    if kind == "audio" and fact("length"):
        require_audio("audio", batch["audio"], fact("length"))
        if fact("classes") and fact("conditional") is not False and "labels" in batch:
            require_labels("labels", batch["labels"], len(batch["audio"]), fact("classes"))
