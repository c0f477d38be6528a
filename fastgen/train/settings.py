"""Settings of a run: the request to train, and the header of its checkpoint that it becomes."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fastgen.batch import current_names
from fastgen.data import BUNDLED, SOURCES, DataConfig, Dataset, Items, bundled_name, load_data
from fastgen.models import MODELS, GenerativeModel, from_data
from fastgen.models.sizes import DataSize
from fastgen.train.checkpoint import Header, load_checkpoint
from fastgen.train.config import FREE_ON_RESUME, TrainConfig
from fastgen.train.errors import UsageError
from fastgen.train.folder import RunFolder
from fastgen.train.limits import check_sizes
from fastgen.train.presets import KINDS, Preset, find_preset

ModelClass = type[GenerativeModel]


@dataclass(frozen=True)
class Request:
    """A request to train. The options hold only what was given; the rest has its default or, on ``resume``, the run's
    own value."""

    model: str
    folder: RunFolder
    data_options: Mapping[str, Any] = field(default_factory=dict)
    train_options: Mapping[str, Any] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)
    preset: str = ""
    dry_run: bool = False  # for ``run.plan``
    resume: bool = False
    overwrite: bool = False
    command: str = ""  # the command line, for the report
    model_class: ModelClass | None = None  # of a model that is not registered; ``model`` is then FILE.py:CLASS


def find_class(name: str, given: ModelClass | None = None) -> ModelClass:
    """The class of a run's model: a registered one, or ``given``, the class from the user's own file.

    Raises:
        UsageError: another class is given, or none for a model that is not registered. The file that a run recorded is
            never loaded on its own account, as that would run code that the user did not name.
    """
    if given is None:
        if name not in MODELS:
            raise UsageError(
                f"model: expected {name}, as in the run, got none (sample and evaluate take it as --model)"
            )
        return MODELS[name]
    if given is not MODELS.get(name) and given.__name__ != name.rpartition(":")[2]:
        raise UsageError(f"model: expected {name}, as in the run, got {given.__name__}")
    return given


def same_model(name: str, other: str) -> bool:
    """Whether two names are the same registered model, or the same class of a file, which may have moved."""
    return name == other or (":" in name and ":" in other and name.rpartition(":")[2] == other.rpartition(":")[2])


def new_settings(request: Request) -> tuple[Header, Dataset, Chosen]:
    """The header and the data of a new run, and what was chosen for the data.

    Options that are given override those of a preset, these override what the model suggests for the data, and these
    override its general defaults.
    """
    model_class = find_class(request.model, request.model_class)
    preset = _preset(request, model_class)
    given = {**preset.train, **request.train_options}
    _checked(TrainConfig, {**model_class.train_defaults, **given})  # before the data are loaded
    source = {"source": _default_source(model_class), **preset.data, **request.data_options}
    data_config = _absolute(_checked(DataConfig, source))
    data = load_data(data_config, *kinds_of(model_class))
    known = {**data.facts, "kind": data.kind}
    required = from_data(model_class.config_class)
    missing = [name for name in required if name not in known]
    if missing and not model_class.kinds:
        raise UsageError(f"data: expected a dataset with {missing[0]}, for {request.model}, got {data.name}")
    facts = {name: known[name] for name in required if name in known}
    check_sizes(request.model_options)
    options = _preset_options(preset, model_class) | dict(request.model_options)
    chosen = _chosen(model_class, data, given, options, preset)
    if given.get("init_from"):
        given["init_from"] = str(Path(given["init_from"]).resolve())
        options = _options_of(given["init_from"], request, model_class, facts) | options
        chosen = Chosen(chosen.size, {name: v for name, v in chosen.options.items() if "." not in name})
    suggested = {name.removeprefix(MODEL): v for name, v in chosen.options.items() if name.startswith(MODEL)}
    model_options = {**facts, **suggested, **options}
    try:
        model_config = _checked(model_class.config_class, model_options, prefix=MODEL)
    except UsageError as error:
        raise UsageError(f"{error}{_remedy(str(error), model_class, model_options, data_config)}") from error
    train = {name: value for name, value in chosen.options.items() if not name.startswith(MODEL)}
    config = _checked(TrainConfig, {**model_class.train_defaults, **_no_steps(given), **train, **given})
    kept = asdict(data_config) | {"source": data_config.source.removeprefix(BUNDLED)}
    return Header(request.model, asdict(model_config), asdict(config), kept, data.fingerprint), data, chosen


MODEL = "model."  # begin of the names of a model's options


@dataclass(frozen=True)
class Chosen:
    """Options that were chosen for the size of the data, where they differ from the model's general defaults."""

    size: DataSize | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [f"--{name.replace('_', '-')} {value}" for name, value in self.options.items()]
        return f"chosen for {self.size}: {' '.join(words)}"


def _chosen(
    model_class: ModelClass, data: Dataset, given: Mapping[str, Any], options: Mapping[str, Any], preset: Preset
) -> Chosen:
    """What the model suggests for the data, without what the user or the preset gives."""
    facts = data.facts
    image = {name: facts.get(name, 0) for name in ("image_size", "channels", "levels")}
    size = DataSize(data.kind, len(data.train), **image, gpu=preset.gpu)
    given = {**given, **{MODEL + name: value for name, value in options.items()}}
    suggested = model_class.suggested(size, given)
    if "epochs" in given:
        suggested.pop("steps", None)
    return Chosen(size, {name: value for name, value in suggested.items() if name not in given})


def _no_steps(given: Mapping[str, Any]) -> dict[str, int]:
    """Epochs that are given replace a default number of steps."""
    return {"steps": 0} if "epochs" in given else {}


def _preset(request: Request, model_class: ModelClass) -> Preset:
    try:
        preset = find_preset(request.preset)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if request.preset and not set(kinds_of(model_class)) & set(KINDS):
        raise UsageError(f"preset: expected none, as {request.model} takes no images, got {request.preset!r}")
    return preset


def _preset_options(preset: Preset, model_class: ModelClass) -> dict[str, Any]:
    own = {each.name for each in fields(model_class.config_class)}
    return {name: value for name, value in preset.model.items() if name in own}


FREE_FACTS = frozenset(("caption_examples",))
"""Facts of the data in a model's config that its weights do not depend on."""


def _options_of(init_from: str, request: Request, model_class: ModelClass, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The model's options in the run that training starts from.

    Raises:
        FileNotFoundError, ValueError: no run, or a damaged one. UsageError: a run of another model, or data with other
            facts, such as classes or a vocabulary, than the weights were trained on.
    """
    saved, _ = load_checkpoint(RunFolder(Path(init_from)).checkpoint)
    if not same_model(saved.model, request.model):
        raise UsageError(f"init_from: expected a run of {request.model}, got one of {saved.model} in {init_from}")
    options = current_names(model_class.config_class, saved.model_config)
    for name, value in facts.items():
        before = options.pop(name, value)
        before = tuple(before) if isinstance(before, list) else before
        if before != value and name not in FREE_FACTS:
            raise UsageError(
                f"init_from: expected data with {name} {_brief(before)}, as in {init_from}, got {_brief(value)}"
            )
    return options


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _default_source(model_class: ModelClass) -> str:
    """ "" where the model has none."""
    return BUNDLED + model_class.default_data if hasattr(model_class, "default_data") else ""


def resumed_settings(request: Request, saved: Header) -> tuple[Header, Dataset]:
    """The run's own settings, with the changes that the request may make."""
    if request.preset:
        raise UsageError(f"preset: expected none with --resume, which keeps the run's options, got {request.preset!r}")
    _checked(TrainConfig, {**saved.train_config, **request.train_options})
    fixed = {name: value for name, value in request.train_options.items() if name not in FREE_ON_RESUME}
    if fixed.get("init_from"):
        fixed["init_from"] = str(Path(fixed["init_from"]).resolve())
    data_options = dict(request.data_options)
    source = saved.data_config["source"]
    if "source" in data_options:
        source = _absolute(_checked(DataConfig, {"source": data_options.pop("source")})).source.removeprefix(BUNDLED)
    if "test_data" in data_options:
        data_options["test_data"] = _absolute(_checked(DataConfig, {"test_data": data_options["test_data"]})).test_data
    if "direction" in data_options:
        data_options["direction"] = _checked(DataConfig, {"direction": data_options["direction"]}).direction
    model = saved.model if same_model(request.model, saved.model) else request.model
    pairs: list[tuple[str, Any, Any]] = [("model", model, saved.model)]
    pairs += [(name, value, saved.train_config.get(name)) for name, value in fixed.items()]
    pairs += [(name, value, saved.data_config.get(name)) for name, value in data_options.items()]
    pairs += [(f"model.{name}", value, saved.model_config.get(name)) for name, value in request.model_options.items()]
    for name, given, own in pairs:
        if given != own:
            raise UsageError(
                f"{name}: expected {_shown(own)}, as in the run in {request.folder.path}, got {_shown(given)};"
                f" with --resume only {', '.join(FREE_ON_RESUME)} may change"
            )
    free = {name: value for name, value in request.train_options.items() if name in FREE_ON_RESUME}
    header = replace(
        saved,
        model=request.model,
        train_config=saved.train_config | free,
        data_config=saved.data_config | {"source": source},
    )
    return header, data_of(header, request.folder, request.model_class)


def _shown(value: Any) -> str:
    return "its default" if value is None else repr(value)


def changed(before: Header, after: Header, model_class: ModelClass | None = None) -> dict[str, list[Any]]:
    """Options of training and data that differ, by name: the old value and the new one."""
    old, new = settings(before, model_class), settings(after, model_class)
    return {name: [old.get(name), value] for name, value in new.items() if name != "model" and old.get(name) != value}


def data_of(header: Header, folder: RunFolder, model_class: ModelClass | None = None) -> Dataset:
    """The dataset of a run. Raises UsageError where it is no longer the same."""
    config = DataConfig(**header.data_config)
    if config.source in SOURCES:  # paths are kept absolute
        config = replace(config, source=BUNDLED + config.source)
    data = load_data(config, *kinds_of(find_class(header.model, model_class)))
    if data.fingerprint != header.fingerprint:
        raise UsageError(
            f"data: expected the data that the run in {folder.path} was trained on, got others in {data.name}"
        )
    return data


def kinds_of(model_class: ModelClass) -> tuple[str, ...]:
    return model_class.kinds or (model_class.kind,)


def split(data: Dataset, model_config: Any) -> tuple[Items, Items]:
    """Training and held-out items; the model's config decides the length of windows of text."""
    options: dict[str, Any] = getattr(model_config, "data_options", dict)()
    return data.splits(**options)


def configs(
    checkpoint: Path, header: Header, model_class: ModelClass | None = None
) -> tuple[ModelClass, Any, TrainConfig]:
    """The model's class and the configs of a header. ValueError names the checkpoint, and what does not fit.

    Options that the header of an earlier version lacks have their defaults.
    """
    try:
        if not header.model_config or not header.data_config.get("source"):
            raise ValueError(
                f"no {'options of the model' if header.data_config.get('source') else 'source of the data'}"
            )
        DataConfig(**header.data_config)
        model_class = find_class(header.model, model_class)
        config = model_class.config_class(**current_names(model_class.config_class, header.model_config))
        return model_class, config, TrainConfig(**header.train_config)
    except UsageError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint}: expected a checkpoint of this version of fastgen, got {error}") from error


def _absolute(config: DataConfig) -> DataConfig:
    """With a source that is the same from every working directory. ValueError: an ambiguous name."""
    if config.test_data and os.path.exists(config.test_data):
        config = replace(config, test_data=str(Path(config.test_data).resolve()))
    name = bundled_name(config.source)
    if name is not None:
        return replace(config, source=BUNDLED + name)
    return replace(config, source=str(Path(config.source).resolve())) if os.path.exists(config.source) else config


def _checked(config_class: Any, options: Mapping[str, Any], prefix: str = "") -> Any:
    try:
        return config_class(**options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{prefix}{error}") from error


RESIZED = (None, "textures", "photos")  # sources that take --image-size; None: all that are not bundled


def _remedy(error: str, model_class: ModelClass, options: Mapping[str, Any], data: DataConfig) -> str:
    """What to change where the data do not fit the model, as the end of a message: sizes of images, labels."""
    if error.startswith(f"{MODEL}image_size: ") and bundled_name(data.source) in RESIZED:
        size = options["image_size"]
        ways = (range(size - 1, size // 2 - 1, -1), range(size + 1, 2 * size + 1))
        found = [next((n for n in way if _fits(model_class, {**options, "image_size": n})), 0) for way in ways]
        sizes = " or ".join(str(n) for n in sorted(filter(None, found), key=lambda n: abs(n - size)))
        return f": --image-size {sizes} resizes and crops the images" if sizes else ""
    if options.get("classes") == 0 and error.startswith((f"{MODEL}classes: ", f"{MODEL}conditional: ")):
        return ": the data have no labels, which are subfolders, one for each class, or an array, a column or a file"
    return ""


def _fits(model_class: ModelClass, options: Mapping[str, Any]) -> bool:
    try:
        model_class.config_class(**options)
    except (TypeError, ValueError):
        return False
    return True


def settings(header: Header, model_class: ModelClass | None = None) -> dict[str, Any]:
    """A run's options as the command line takes them."""
    facts = from_data(find_class(header.model, model_class).config_class)
    own = {name: value for name, value in header.model_config.items() if name not in facts}
    data = dict(header.data_config)
    return {"data": data.pop("source"), **data, **header.train_config, "model": own}


def command(model: str, folder: RunFolder, option: str) -> str:
    """The command that reproduces the run ("--config"), or resumes it ("--resume")."""
    path = shlex.quote(str(folder.path))
    if option == "--config":
        return f"fastgen train {shlex.quote(model)} --config {shlex.quote(str(folder.config))} --out ANOTHER_FOLDER"
    return f"fastgen train {shlex.quote(model)} --out {path} {option}"
