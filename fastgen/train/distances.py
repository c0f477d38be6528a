"""The Frechet distance of samples from held-out images, in the course of training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgen import metrics
from fastgen.data import Items
from fastgen.functional._autocast import without_autocast
from fastgen.metrics.features import MIN_IMAGES
from fastgen.models import GenerativeModel, Images
from fastgen.train.checkpoint import Header
from fastgen.train.engine import Engine
from fastgen.train.errors import UsageError
from fastgen.train.evaluation import all_items
from fastgen.train.feature_space import feature_space
from fastgen.train.folder import RunFolder
from fastgen.train.progress import Stages

NAME = "Frechet distance"
BATCH = 256  # samples drawn at once


def check_distances(count: int, model: GenerativeModel, splits: tuple[Items, Items], processes: int) -> None:
    """UsageError: the option ``distance_samples``, with a model that makes no images, too few, or several processes."""
    if not count:
        return
    if model.kind != "images":
        raise UsageError(f"distance_samples: expected 0, as {model.name} makes no images, got {count}")
    if processes > 1:
        raise UsageError(f"distance_samples: expected 0 with several processes, got {count}")
    if count < 2 or len(splits[0]) < MIN_IMAGES or len(splits[1]) < 2:
        raise UsageError(
            f"distance_samples: expected 2 or more, with at least {MIN_IMAGES} training and 2 held-out images, got"
            f" {count}, with {len(splits[0])} and {len(splits[1])}"
        )


class Distances:
    """Distances of always the same noise, in the feature space that ``fastgen evaluate`` has for the data.

    The space is trained at the first measurement, unless the run's folder or one beside it has it.

    Args:
        splits: training items, on which the space is trained, and held-out items.
        count: samples of a measurement. With fewer held-out images, or fewer samples, distances are larger: compare
            them within a run, or between runs of the same data and number.
    """

    def __init__(
        self, engine: Engine, header: Header, folder: RunFolder, splits: tuple[Items, Items], count: int
    ) -> None:
        self.engine, self.header, self.folder, self.splits, self.count = engine, header, folder, splits, count
        self._space: metrics.FeatureSpace | None = None
        self._real: Tensor | None = None

    def measure(self) -> dict[str, float]:
        """The distance of samples of the model as it is; NaN for samples that are."""
        model, generator = self.engine.model, torch.Generator().manual_seed(0)
        space, real = self._prepared()
        parts = []
        for start in range(0, self.count, BATCH):
            size = min(BATCH, self.count - start)
            samples = model.draw(size, model.sampling_class(), generator=generator)
            assert isinstance(samples, Images)
            pixels = samples.pixels.float().clamp(0, 1)
            if not bool(pixels.isfinite().all()):
                return {NAME: math.nan}
            with without_autocast(self.engine.device):
                parts.append(space(pixels))
        return {NAME: metrics.frechet_distance(real, torch.cat(parts))}

    def _prepared(self) -> tuple[metrics.FeatureSpace, Tensor]:
        if self._space is None or self._real is None:
            known, held_out = (all_items(items, BATCH) for items in self.splits)
            name, fingerprint = str(self.header.data_config["source"]), self.header.fingerprint
            device = self.engine.device
            with without_autocast(device):
                self._space = feature_space(
                    "auto", name, known, held_out, self.folder, fingerprint, device, Stages("train")
                )
                self._real = self._space(held_out["images"].to(device))
        return self._space, self._real
