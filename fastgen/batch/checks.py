"""Checks of what models are given: images, tokens, labels, captions, sound.

Kinds, dtypes and shapes are checked in every call. Values are looked at where that waits for nothing: on the CPU, and
not while a call is traced or transformed. Training looks at its data once, before it begins, whatever the device. NaN
is refused there only: in a step it makes the loss NaN, and training skips the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.checks import require_shape, require_tensor, shape_of
from fastgen.ops.transforms import transforms_active

SLACK = 1e-3  # beyond the ends of a range, for what resampling and low precision do
FIRST_CHARACTER = 3  # of sequences, after padding, start and end
NEVER_IGNORED = -(1 << 40)
"""``ignore_index`` of cross-entropies: torch's own, -100, would give a target of -100 the loss 0."""


def readable(tensor: Tensor) -> bool:
    """Whether the values can be looked at without waiting for a device, breaking a graph or a transform."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not transforms_active()
    )


def require_range(name: str, tensor: Tensor, low: float, high: float, meaning: str, hint: str = "") -> None:
    """Raises ValueError where readable values are below low or above high. NaN passes: what comes of it is NaN."""
    if not readable(tensor) or not tensor.numel():
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
    require_range(name, images, -SLACK, 1 + SLACK, "pixels in [0, 1]", "; scale them, as x / 255 or (x + 1) / 2 would")


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
    require_range(name, audio, -1 - SLACK, 1 + SLACK, "samples in [-1, 1]")


def require_same_batch(first_name: str, first: Tensor, name: str, tensor: Tensor) -> None:
    """Raises ValueError unless both have as many items: of one item, arithmetic would make many."""
    if len(first) != len(tensor):
        raise ValueError(f"{name}: expected as many items as {first_name}, {len(first)}, got {len(tensor)}")


def _require_some(name: str, tensor: Tensor) -> None:
    if tensor.size(0) == 0:
        raise ValueError(f"{name}: expected at least one item, got shape {shape_of(tensor)}")


def check_batch(kind: str, config: Any, batch: Mapping[str, Tensor]) -> None:
    """Raises TypeError, ValueError for a batch of the kind (``KINDS``) that does not fit a config.

    What a config does not tell is not checked, nor tensors that are not there. NaN and infinity are refused.
    """
    for name, tensor in batch.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinite ones")

    def told(field: str) -> Any:
        return getattr(config, field, None)

    if kind in ("images", "pairs", "domains") and told("image_size") and told("channels"):
        for name in ("images", "inputs", "targets", "a", "b"):
            if name in batch:
                channels = told("input_channels") if name == "inputs" else told("channels")
                require_images(name, batch[name], channels, told("image_size"))
    if kind == "images" and told("classes") and told("conditional") is not False and "labels" in batch:
        require_labels("labels", batch["labels"], len(batch["images"]), told("classes"))
    if kind == "images" and told("captions") and "caption" in batch:
        count = 1 + len(told("caption_vocabulary"))
        shape = (len(batch["images"]), told("caption_length"))
        require_tokens("caption", batch["caption"], count, shape, "(B, caption_length)")
    if kind == "text" and told("vocabulary"):
        require_tokens("tokens", batch["tokens"], len(told("vocabulary")))
    if kind == "sequences" and told("vocabulary"):
        for name in ("source", "target"):
            shape = (len(batch["source"]), told(f"{name}_length"))
            require_tokens(name, batch[name], FIRST_CHARACTER + len(told("vocabulary")), shape, f"(B, {name}_length)")
    if kind == "audio" and told("length"):
        require_audio("audio", batch["audio"], told("length"))
