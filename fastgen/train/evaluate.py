"""Evaluation of a trained model on held-out items: likelihoods, distances in a feature space, harmonicity."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import torch
from accelerate import Accelerator
from torch import Tensor

from fastgen import metrics
from fastgen.batch import TRANSLATED, option
from fastgen.data import Items
from fastgen.metrics.bootstrap import MIN_SET_SIZE
from fastgen.metrics.features import MIN_IMAGES
from fastgen.models import Images, Sounds
from fastgen.train.card import write_card
from fastgen.train.config import TrainConfig
from fastgen.train.evaluation import MOST, Thinned, all_items, scores
from fastgen.train.feature_space import Space, feature_space
from fastgen.train.files import write_whole
from fastgen.train.folder import RunFolder
from fastgen.train.progress import Stages
from fastgen.train.report import write_report
from fastgen.train.settings import ModelClass, data_of, split
from fastgen.train.sharding import leave, make_accelerator
from fastgen.train.trained import Trained, check_seed, joined, open_run

MOST_EACH = 10**6  # upper limit of n, k, batch size, importance samples and resamples
SOUNDS = 32  # sampled at most: each takes seconds


@dataclass(frozen=True)
class EvaluateConfig:
    """Options of an evaluation.

    Raises:
        ValueError: an option out of range.
    """

    n: int = option(1000, f"number of samples: images for distances; sounds for harmonicity, at most {SOUNDS}")
    importance: int = option(50, "posterior samples of the importance-weighted bound; 0: not computed")
    features: Space = option(
        "auto", "feature space of distances; auto: a classifier trained on the data, or rotations without labels"
    )
    k: int = option(5, "nearest neighbors of precision, recall, density and coverage")
    resamples: int = option(200, "bootstrap resamples of the confidence intervals of distances; 0: no intervals")
    batch_size: int = option(256, "batch size")
    seed: int = option(0, "seed of all noise")
    device: str = option("auto", "device: cpu, cuda, ...; auto: cuda if available")

    def __post_init__(self) -> None:
        for name in ("n", "k", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("importance", "resamples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        for name in ("n", "k", "batch_size", "importance", "resamples"):
            if getattr(self, name) > MOST_EACH:
                raise ValueError(f"{name}: expected at most {MOST_EACH}, got {getattr(self, name)}")
        if self.features not in get_args(Space):
            raise ValueError(f"features: expected one of {', '.join(get_args(Space))}, got {self.features!r}")
        check_seed(self.seed)


def evaluate(
    folder: RunFolder, config: EvaluateConfig, model_class: ModelClass | None = None, *, quiet: bool = True
) -> list[metrics.Metric]:
    """All metrics of a run's model, also written to evaluation.json and the report.

    Args:
        model_class: the class of a model that is not registered.
        quiet: print no progress.

    Raises:
        FileNotFoundError, ValueError: no run, a checkpoint that does not fit, or too few images where distances are
        all that there is to measure; else these are left out, with a note. UsageError: options or data that do not fit
        the run.
    """
    trained = open_run(folder, config.device, model_class)
    data = data_of(trained.header, folder, type(trained.model))
    train, held_out = split(data, trained.model.config)
    accelerator = make_accelerator(TrainConfig(batch_size=1), trained.model.device)
    stages = Stages("evaluate", quiet=quiet)
    settings = asdict(config)
    if lacking := _lacking_for_distances(trained, train, held_out, config):
        config = replace(config, features="none")
        stages.note(f"distances are left out: {lacking} (--features none leaves them out)")
    try:
        with torch.no_grad():
            results = _likelihoods(trained, held_out, config, accelerator, stages)
            if trained.model.kind in TRANSLATED or (trained.model.kind == "images" and config.features != "none"):
                measure = {"images": _distances, "domains": _domains, "pairs": _pairs}[trained.model.kind]
                results += measure(_Evaluation(trained, data.name, train, held_out, config, folder, stages))
            if trained.model.kind == "audio":
                results += _sounds(trained, held_out, config, stages)
    finally:
        leave(accelerator)
    if lacking and not results:
        raise ValueError(f"{trained.model.name} is evaluated by distances alone: {lacking}")
    kept: dict[str, Any] = {"step": trained.step, "settings": settings}
    kept |= {"figures": [asdict(result) for result in results]}
    kept |= {"notes": [f"distances are left out: {lacking}"]} if lacking else {}
    write_whole(folder.evaluation, (json.dumps(kept, indent=2) + "\n").encode())
    write_report(folder.path)
    if folder.pretrained.is_dir():
        write_card(folder, trained.model)
    return results


def _lacking_for_distances(trained: Trained, train: Items, held_out: Items, config: EvaluateConfig) -> str:
    """What distances need more of, as "expected ..., got ..."; "" if there is enough, or they are not wanted."""
    kind = trained.model.kind
    if config.features == "none" or (kind != "images" and kind not in TRANSLATED):
        return ""
    known = len(train) * (2 if kind == "domains" else 1)  # both domains are one set
    if config.features != "inception" and known < MIN_IMAGES:
        return f"expected at least {MIN_IMAGES} training images, to train their feature space on, got {known}"
    sets = {"held-out images": len(held_out), "training images": len(train)}
    if kind == "images":
        sets["samples (--n)"] = config.n
    for name, count in sets.items():
        if config.resamples and count < MIN_SET_SIZE:
            return f"expected at least {MIN_SET_SIZE} {name}, with resamples {config.resamples}, got {count}"
        if count < 2:
            return f"expected at least 2 {name}, got {count}"
        if kind == "images" and name != "training images" and count <= config.k:
            return f"expected more {name} than k = {config.k}, got {count}"
    return ""


@dataclass(frozen=True)
class _Evaluation:
    """A trained model, its data by name and split, and where and how it is evaluated."""

    trained: Trained
    data: str
    train: Items
    held_out: Items
    config: EvaluateConfig
    folder: RunFolder
    stages: Stages

    def images(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Held-out and training items on the CPU."""
        return all_items(self.held_out, self.config.batch_size), all_items(self.train, self.config.batch_size)

    def space(self, known: dict[str, Tensor], real: dict[str, Tensor]) -> metrics.FeatureSpace:
        """The feature space of the data, trained on known items if it is a network of its own."""
        fingerprint, device = self.trained.header.fingerprint, self.trained.model.device
        return feature_space(
            self.config.features, self.data, known, real, self.folder, fingerprint, device, self.stages
        )

    def translated(self, options: Any) -> Tensor:
        """Translations of the held-out items that ``images`` returns, on the CPU."""
        generator = torch.Generator().manual_seed(self.config.seed)
        translated = self.trained.translate(Thinned(self.held_out, MOST), options, generator)
        generated = joined(list(self.stages.over("translations", translated, None)))
        assert isinstance(generated, Images)
        return generated.pixels.float().clamp(0, 1).cpu()


def _likelihoods(
    trained: Trained, items: Items, config: EvaluateConfig, accelerator: Accelerator, stages: Stages
) -> list[metrics.Metric]:
    model = trained.model

    def call(method: str, *args: Any, **options: Any) -> Any:
        return getattr(model, method)(*args, **options)

    def per_item(method: str, seed: int) -> dict[str, Tensor]:
        return scores(call, items, config.batch_size, accelerator, method, seed)

    stages.begin("scores of the held-out items")
    values = per_item("score", config.seed)
    if not values:
        return []
    if hasattr(model, "log_weights") and config.importance:
        draws = stages.over("importance-weighted bound", range(config.importance), config.importance)
        log_weights = (per_item("log_weights", config.seed + k)["log_weights"] for k in draws)
        values["iwae"] = metrics.importance_weighted_bound(log_weights)
    has_bits = model.kind == "images" and not values.keys().isdisjoint(("iwae", "elbo", "nll"))
    dims = items.batch(torch.tensor([0]))["images"][0].numel() if has_bits else None
    return metrics.summarize(values, dims, seed=config.seed)


def _distances(of: _Evaluation) -> list[metrics.Metric]:
    """Distances of samples from held-out images, class agreement, and whether samples copy training images."""
    config, trained = of.config, of.trained
    real, known = of.images()
    space = of.space(known, real)
    generator = torch.Generator().manual_seed(config.seed)
    drawn = of.stages.over("samples", trained.draw(config.n, trained.model.sampling_class(), generator), None)
    generated = joined(list(drawn))
    assert isinstance(generated, Images)
    of.stages.begin("distances")
    pixels = generated.pixels.float().clamp(0, 1).cpu()
    results = metrics.evaluate_images(
        real["images"],
        pixels,
        space,
        training=known["images"],
        k=config.k,
        resamples=config.resamples,
        seed=config.seed,
    )
    if generated.labels is not None and space.kind == "classifier":
        results.append(metrics.class_agreement(pixels, generated.labels, space))
    results.append(
        metrics.closer_than_held_out(
            real["images"], pixels, known["images"], resamples=config.resamples, seed=config.seed
        )
    )
    return results + _captions(of, space)


def _captions(of: _Evaluation, space: metrics.FeatureSpace) -> list[metrics.Metric]:
    """Agreement of samples from held-out captions with the images of these captions, at most n of them."""
    model, config = of.trained.model, of.config
    if not getattr(model.config, "captions", False):
        return []
    real = all_items(Thinned(of.held_out, config.n), config.batch_size)
    images, captions = real["images"], real["caption"]
    if len(captions.unique(dim=0)) < 2:
        return []
    generator = torch.Generator().manual_seed(config.seed)
    drawn = of.trained.draw_captioned(captions, model.sampling_class(), generator)
    generated = joined(list(of.stages.over("samples of held-out captions", drawn, None)))
    assert isinstance(generated, Images)
    pixels = generated.pixels.float().clamp(0, 1).cpu()
    return [metrics.caption_agreement(images, pixels, captions, space, resamples=config.resamples, seed=config.seed)]


def _domains(of: _Evaluation) -> list[metrics.Metric]:
    """Distances in both directions; "auto" features come from a classifier of the two domains."""
    config = of.config
    if config.features == "none":
        return []
    real, known = of.images()
    space = of.space(_as_classes(known), _as_classes(real))
    results = []
    for source, target in (("a", "b"), ("b", "a")):
        results += metrics.evaluate_domains(
            real[target],
            of.translated(of.trained.model.sampling_class(direction=f"{source}-to-{target}")),
            real[source],
            space,
            name=f"{source} to {target}",
            training=known[target],
            label="ab".index(target),
            resamples=config.resamples,
            seed=config.seed,
        )
    return results


def _pairs(of: _Evaluation) -> list[metrics.Metric]:
    """Errors against the targets, and distances from them."""
    config = of.config
    real, known = of.images()
    outputs = of.translated(of.trained.model.sampling_class())
    if config.features == "none":
        return metrics.evaluate_pairs(outputs, real["targets"], real["inputs"], seed=config.seed)
    return metrics.evaluate_pairs(
        outputs,
        real["targets"],
        real["inputs"],
        of.space({"images": known["targets"]}, {"images": real["targets"]}),
        training=known["targets"],
        resamples=config.resamples,
        seed=config.seed,
    )


def _sounds(trained: Trained, held_out: Items, config: EvaluateConfig, stages: Stages) -> list[metrics.Metric]:
    """Harmonicity; none for sounds too short to measure it."""
    model_config: Any = trained.model.config
    if model_config.length < metrics.SHORTEST * model_config.sample_rate:
        return []
    generator = torch.Generator().manual_seed(config.seed)
    stages.begin("samples")
    generated = joined(list(trained.draw(min(config.n, SOUNDS), trained.model.sampling_class(), generator)))
    assert isinstance(generated, Sounds)
    real = all_items(Thinned(held_out, SOUNDS), config.batch_size)["audio"]
    return metrics.evaluate_sounds(
        real, generated.waves, generated.sample_rate, resamples=config.resamples, seed=config.seed
    )


def _as_classes(domains: dict[str, Tensor]) -> dict[str, Tensor]:
    """Images of both domains, a as class 0."""
    labels = torch.arange(2).repeat_interleave(torch.tensor([len(domains["a"]), len(domains["b"])]))
    return {"images": torch.cat([domains["a"], domains["b"]]), "labels": labels}
