"""The feature space of an evaluation: trained once for the data, kept in the run's folder, found by other runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastgen import metrics
from fastgen.data._files import read_bytes
from fastgen.models.digest import KEY, UNSEALED, is_whole, seal
from fastgen.train.errors import UsageError
from fastgen.train.files import write_whole
from fastgen.train.folder import RunFolder
from fastgen.train.progress import Stages

Space = Literal["auto", "classifier", "rotations", "inception", "none"]
FEATURES_FORMAT = "fastgen-features"


def feature_space(
    kind: Space,
    name: str,
    known: dict[str, Tensor],
    real: dict[str, Tensor],
    folder: RunFolder,
    fingerprint: str,
    device: torch.device,
    stages: Stages,
) -> metrics.FeatureSpace:
    """The feature space on a device: the one in the run's folder, or in that of a run beside it on the same
    data; else it is trained. It is then in the run's folder.

    Args:
        kind: a classifier, rotations, or whichever the data have labels for.
        name: of the data.
        known, real: training and held-out images, with labels where there are classes.
        fingerprint: of the dataset.

    Raises:
        UsageError: a classifier of data without classes. ValueError: the run's file is damaged.
    """
    name = Path(name).name if Path(name).exists() else name
    if kind == "auto":
        kind = "classifier" if "labels" in known else "rotations"
    if kind == "classifier" and "labels" not in known:
        raise UsageError(f"features: expected rotations or inception for {name}, which has no classes, got classifier")
    if kind == "inception":
        return metrics.inception_features().to(device)
    expected = {"format": FEATURES_FORMAT, "kind": kind, "fingerprint": fingerprint}
    saved = _saved_space(folder, expected, known["images"], device)
    if saved is not None:
        return saved
    space = _space_beside(folder, expected, known["images"], device)
    if space is None:
        what = "a classifier" if kind == "classifier" else "a network that recognizes rotations"
        stages.note(f"training {what} of {name} for the distances, once for these data")
        space = _trained_space(kind, name, known, real)
    tensors, meta = space.state()
    data = safetensors.torch.save(tensors, {**expected, "meta": json.dumps(meta), **UNSEALED})
    write_whole(folder.features, seal(data))
    return space.to(device)


def _trained_space(kind: str, name: str, known: dict[str, Tensor], real: dict[str, Tensor]) -> metrics.FeatureSpace:
    with torch.enable_grad():
        if kind == "classifier":
            held_out = (real["images"], real["labels"])
            return metrics.classifier_features(known["images"], known["labels"], held_out=held_out, data=name)
        return metrics.rotation_features(known["images"], data=name)


def _space_beside(
    folder: RunFolder, expected: dict[str, str], images: Tensor, device: torch.device
) -> metrics.FeatureSpace | None:
    """The feature space of another run of the same data, whose folder is beside this one."""
    for path in sorted(folder.path.resolve().parent.glob("*/features.safetensors")):
        try:
            space = _saved_space(RunFolder(path.parent), expected, images, device)
        except (OSError, ValueError):  # damaged: that run's evaluation says so
            continue
        if space is not None:
            return space
    return None


def _saved_space(
    folder: RunFolder, expected: dict[str, str], images: Tensor, device: torch.device
) -> metrics.FeatureSpace | None:
    """The feature space of an earlier evaluation, if there is one for these data.

    Args:
        images: the images it was trained on.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder.features
    if not path.exists():
        return None
    again = "remove it, and it is trained again"
    data = read_bytes(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        if not is_whole(data):
            raise ValueError("its digest differs")
        if {name: found.get(name) for name in expected} != expected:
            return None
        space = metrics.FeatureSpace.from_state(tensors, json.loads(found["meta"])).to(device)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: expected a feature space, got a damaged file ({error}); {again}") from error
    if KEY not in found:  # saved by an earlier version: trained features have mean 0 and deviation 1
        std, mean = torch.std_mean(space(images), dim=0)
        if not (float((std - 1).abs().median()) < 0.1 and float(mean.abs().median()) < 0.1):
            raise ValueError(f"{path}: expected features of mean 0 and deviation 1, got others: damaged? {again}")
    return space
