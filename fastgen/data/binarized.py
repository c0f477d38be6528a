"""Images whose pixels are drawn as black or white."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from fastgen.data._base import Dataset, Items, TensorItems, digest


class Binarized(TensorItems):
    """Images whose pixels are 1 with the probability that their values give, drawn anew in each training step.

    Outside of training (``batch``) they are those of one fixed draw, ``fixed``.
    """

    def __init__(self, tensors: Mapping[str, Tensor], scale: Mapping[str, float], fixed: Tensor) -> None:
        super().__init__({**tensors, "fixed": fixed}, {**scale, "fixed": 1.0})

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        out = super().batch(indices)
        out["images"] = out.pop("fixed")
        return out

    def training_batch(self, indices: Tensor, seed: int) -> dict[str, Tensor]:
        out = super().batch(indices)
        del out["fixed"]
        noise = torch.rand(out["images"].shape, generator=torch.Generator().manual_seed(seed))
        out["images"] = (noise.to(out["images"].device) < out["images"]).float()
        return out

    def to(self, device: torch.device | str) -> Binarized:
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return Binarized(moved, self.scale, moved.pop("fixed"))


def binarize(data: Dataset, dynamic: bool) -> Dataset:
    """The images with pixels 0 and 1, which are drawn with their values as probabilities.

    Salakhutdinov and Murray, "On the quantitative analysis of deep belief networks" (2008). static: drawn once, with a
    fixed seed. dynamic: training images are drawn anew in each step; held-out ones are those of the static draw.

    Raises:
        ValueError: another kind than images, or images that do not fit into memory.
    """
    if data.kind != "images" or not all(isinstance(items, TensorItems) for items in (data.train, data.held_out)):
        got = data.kind if data.kind != "images" else "images that do not fit into memory"
        raise ValueError(f"{data.name}: binarize: expected images in memory, got {got}")
    generator = torch.Generator().manual_seed(0)
    splits: list[Items] = []
    for items in (data.train, data.held_out):
        assert isinstance(items, TensorItems)
        tensors, scale = items.tensors, items.scale
        noise = torch.rand(tensors["images"].shape, generator=generator)
        fixed = (noise < tensors["images"].float() / scale["images"]).to(torch.uint8)
        if dynamic and items is data.train:
            splits.append(Binarized(tensors, scale, fixed))
        else:
            splits.append(TensorItems({**tensors, "images": fixed}, {**scale, "images": 1.0}))
    fingerprint = digest("binarized", "dynamic" if dynamic else "static", data.fingerprint)
    facts = {**data.facts, "levels": 2}
    return dataclasses.replace(data, facts=facts, fingerprint=fingerprint, train=splits[0], held_out=splits[1])
