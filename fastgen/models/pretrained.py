"""Models as folders: config.json, model.safetensors and a model card, here or on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import nn

from fastgen.batch import current_names
from fastgen.models.digest import UNSEALED, is_whole, seal_file

if TYPE_CHECKING:

    class _HubMixin:
        def save_pretrained(self, save_directory: str | Path, **options: Any) -> Any: ...
        def _save_pretrained(self, save_directory: Path) -> None: ...
        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any: ...

else:
    try:
        from huggingface_hub import PyTorchModelHubMixin as _HubMixin
    except ImportError:

        class _HubMixin:
            """Placeholder when huggingface_hub is not installed."""

            def save_pretrained(self, *args: Any, **options: Any) -> None:
                raise ImportError("save_pretrained needs huggingface_hub: pip install 'fastgen[train]'")

            push_to_hub = save_pretrained

            @classmethod
            def from_pretrained(cls, *args: Any, **options: Any) -> None:
                raise ImportError("from_pretrained needs huggingface_hub: pip install 'fastgen[train]'")


CONFIG, WEIGHTS, CARD, MODEL_TYPE = "config.json", "model.safetensors", "README.md", "model_type"
CLASS_NAMES = "class_names"
DRAWING = {
    "images": "model.sample(16)  # (16, channels, size, size), in [0, 1]",
    "text": "model.sample(4)  # a list of strings",
    "sequences": "model.sample(4)  # a list of strings",
    "audio": "model.sample(4)  # (4, samples), in [-1, 1]",
    "pairs": 'model.translate({"inputs": images}).pixels  # images in [0, 1]',
    "domains": 'model.translate({"a": images}).pixels  # images in [0, 1]',
}


class Pretrained(_HubMixin):
    """``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` through huggingface_hub. Loading never runs code."""

    name: ClassVar[str]
    summary: ClassVar[str]
    config_class: ClassVar[type]
    config: Any
    kind: Any
    class_names: tuple[str, ...] = ()
    """Names of the classes of the training data; saved with the model."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """Load a model from a run's folder, one that ``save_pretrained`` wrote, or a repository of the Hub.

        The model is in evaluation mode. Called on ``GenerativeModel`` itself, the class is the one named in the config.

        Args:
            pretrained_model_name_or_path: a folder, such as "runs/digits", or "owner/name" on the Hub.
            options: map_location (a device, default "cpu"), strict (state-dict keys must match, default True), and for
                the Hub: revision, token, cache_dir, force_download, local_files_only.

        Raises:
            FileNotFoundError: there is no such folder, or no model in it, here or on the Hub.
            ValueError: the model there is of another class, or its files are damaged.
            ImportError: huggingface_hub is not installed.
        """
        place = str(pretrained_model_name_or_path)
        folder = Path(place).expanduser()
        if folder.is_dir():
            folder = _model_in(folder)
            place = str(folder)
            chosen = _class_of(cls, _read_config(folder), place)
        elif folder.exists() or isinstance(pretrained_model_name_or_path, Path) or _is_path(place):
            came = "a file" if folder.exists() else "a path where there is no folder"
            raise FileNotFoundError(f"{place}: expected a folder that save_pretrained wrote, got {came}")
        else:
            chosen = _class_of(cls, _hub_config(place, options), place)
        return super(Pretrained, chosen).from_pretrained(place, **options)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        map_location: str = "cpu",
        strict: bool = True,
        config: Any = None,
        **options: Any,
    ) -> Any:
        from huggingface_hub import hf_hub_download
        from safetensors import SafetensorError
        from safetensors.torch import load_model

        if config is None:
            raise FileNotFoundError(f"{model_id}: expected a saved {cls.__name__}, got no config.json there")
        if options:
            raise TypeError(f"{cls.__name__}.from_pretrained: expected no further options, got {', '.join(options)}")
        saved = None if dataclasses.is_dataclass(config) else config
        class_names: tuple[str, ...] = ()
        if saved is not None:
            class_names = _class_names(model_id, saved)
            saved = {name: value for name, value in saved.items() if name not in (MODEL_TYPE, CLASS_NAMES)}
            current = current_names(cls.config_class, saved)
            known = {f.name for f in dataclasses.fields(cls.config_class)}
            if unknown := sorted(set(current) - known):
                raise ValueError(f"{model_id}: config.json: expected options of {cls.__name__}, got {unknown}")
        file = Path(model_id) / WEIGHTS
        if not Path(model_id).is_dir():
            file = Path(
                hf_hub_download(
                    model_id,
                    file.name,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    token=token,
                    local_files_only=local_files_only,
                )
            )
        if not file.is_file():
            raise FileNotFoundError(f"{file}: expected the weights of a {cls.__name__}, got no file")
        if not is_whole(file.read_bytes()):
            raise ValueError(
                f"{file}: expected the weights of a {cls.__name__}, got a damaged file (its digest differs)"
            )
        if saved is not None:
            check_saved_config(model_id, saved, sorted(known - set(current)), file)
            config = cls.config_class(**current)
        model: Any = cls(config)  # type: ignore[call-arg]
        try:
            load_model(model, file, strict=strict, device=map_location)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{file}: expected the weights of a {cls.__name__}, got: {error}") from error
        model.class_names = class_names
        model.to(map_location)
        model.eval()
        return model

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> Any:
        """Write config.json, model.safetensors and, if there is none yet, README.md.

        The files are written beside the folder's own and then take their place: a saved model that is there is kept
        where writing fails.

        Args:
            save_directory: the folder; made where there is none.
            options: ``model_card_kwargs``, options of ``generate_model_card``; ``push_to_hub`` and ``repo_id`` ("owner/
                name", default the folder's name), with further options of ``push_to_hub``.

        Returns:
            The address of the commit on the Hub with ``push_to_hub``, None without.

        Raises:
            ImportError: huggingface_hub is not installed.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary(folder) as inside:
            written = inside / folder.resolve().name  # the Hub's default name is that of the folder
            result = super().save_pretrained(written, **options)
            for file in sorted(written.iterdir()):
                if file.name != CARD or not (folder / CARD).exists():
                    file.replace(folder / file.name)
        return result

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the weights, with digests of them and of the config in their metadata; and the config."""
        from safetensors.torch import save_model

        config = dataclasses.asdict(self.config)
        file = save_directory / WEIGHTS
        save_model(cast(nn.Module, self), str(file), {**UNSEALED, "config": _config_digest(config)})
        seal_file(file)
        names = {CLASS_NAMES: list(self.class_names)} if self.class_names else {}
        text = json.dumps({MODEL_TYPE: self.name, **names, **config}, sort_keys=True, indent=2) + "\n"
        (save_directory / CONFIG).write_text(text, encoding="utf-8")

    def generate_model_card(self, *, training: str = "", **options: Any) -> Any:
        """The model card, README.md: summary, config, and how to load the model.

        Args:
            training: Markdown about the training of the weights.
        """
        from huggingface_hub import ModelCard

        return ModelCard(self._card(training))

    def _card(self, training: str) -> str:
        name, parameters = type(self).__name__, sum(weight.numel() for weight in _weights(self))
        rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in dataclasses.asdict(self.config).items())
        head = f"---\nlibrary_name: fastgen\ntags:\n- fastgen\n- {self.name}\n---\n\n# {self.name}\n\n"
        return head + (
            f"{self.summary[:1].upper()}{self.summary[1:]}: `{name}` of fastgen, {parameters:,} parameters.\n\n"
            f"{training or 'The training of these weights was not recorded.'}\n\n"
            "## Use\n\n`FOLDER` is this folder, or the repository on the Hugging Face Hub that holds it:\n\n"
            f"```python\nfrom {_importable(type(self))} import {name}\n\n"
            f'model = {name}.from_pretrained("FOLDER")\n{DRAWING.get(self.kind, "")}\n```\n\n'
            f"## Config\n\n| option | value |\n|---|---|\n{rows}\n"
        )


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A folder in ``folder`` for files of a model that is being saved; runs remove those of processes that died."""
    inside = folder / f".saving.{os.getpid()}.tmp"
    shutil.rmtree(inside, ignore_errors=True)
    try:
        yield inside
    finally:
        shutil.rmtree(inside, ignore_errors=True)


def _weights(model: Any) -> Any:
    return model.parameters() if isinstance(model, nn.Module) else ()


def _importable(model_class: type) -> str:
    module = model_class.__module__
    return "fastgen.models" if module.startswith("fastgen.models.") else module


def _cell(value: Any) -> str:
    text = repr(value) if not isinstance(value, str) else f"`{value!r}`"
    text = text if len(text) <= 80 else f"{text[:76]} ..."
    return text.replace("|", "\\|").replace("\n", " ")


def _is_path(place: str) -> bool:
    """Whether the string is a path rather than "owner/name" on the Hub."""
    return place.startswith((".", "/", "~")) or "\\" in place or place.count("/") != 1 or place.endswith("/")


def _model_in(folder: Path) -> Path:
    """The folder of the model: the given one, or that in a run's folder."""
    inside = folder / "model"
    return inside if not (folder / CONFIG).is_file() and (inside / CONFIG).is_file() else folder


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        started = (folder / "checkpoint.safetensors").is_file()
        hint = "; it is a run that has not ended: fastgen train ... --resume ends it" if started else ""
        raise FileNotFoundError(f"{folder}: expected a saved model, got a folder without {CONFIG}{hint}")
    return _parsed(file, str(folder))


def _hub_config(place: str, options: Mapping[str, Any]) -> dict[str, Any]:
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise ImportError("from_pretrained needs huggingface_hub: pip install 'fastgen[train]'") from error
    known = ("revision", "token", "cache_dir", "force_download", "local_files_only")
    try:
        file = hf_hub_download(place, CONFIG, **{name: options[name] for name in known if name in options})
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{place}: expected a folder that save_pretrained wrote, or a model on the Hugging Face Hub; there is no"
            f" such folder, and the Hub answered: {reason}"
        ) from error
    return _parsed(Path(file), place)


def _parsed(file: Path, place: str) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{place}: {CONFIG}: expected JSON, got a file that is cut short or damaged ({error})"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{place}: {CONFIG}: expected options of a model, got {type(config).__name__}")
    return config


def _class_of(asked: type[Pretrained], config: Mapping[str, Any], place: str) -> type[Pretrained]:
    """The class to load: the requested one or, if that is a base class, the one that the config names.

    Models that were saved before configs named their class are recognized by their options.
    """
    from fastgen.models.registry import MODELS

    concrete = hasattr(asked, "config_class")
    named = config.get(MODEL_TYPE)
    if concrete and named in (None, asked.name):
        return asked
    found = [model for model in MODELS.values() if model.name == named or (named is None and _has(model, config))]
    found = [model for model in found if concrete or issubclass(model, asked)]
    names = " or ".join(model.__name__ for model in found)
    if concrete:
        hint = f"; load it by {names}.from_pretrained" if found else ""
        raise ValueError(f"{place}: {CONFIG}: expected a saved {asked.__name__}, got one of model type {named!r}{hint}")
    if len(found) == 1:
        return found[0]
    if not found:
        came = f"model type {named!r}" if named is not None else "options of another"
        raise ValueError(
            f"{place}: {CONFIG}: expected a model of fastgen ({', '.join(sorted(MODELS))}), got {came}; a class of"
            " your own loads its models by its own from_pretrained"
        )
    raise ValueError(
        f"{place}: {CONFIG}: expected a config that names its class, got one of {names}; load it by that class"
    )


def _has(model: type[Pretrained], config: Mapping[str, Any]) -> bool:
    return {field.name for field in dataclasses.fields(model.config_class)} == set(
        current_names(model.config_class, config)
    )


def _class_names(place: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get(CLASS_NAMES, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{place}: {CONFIG}: {CLASS_NAMES}: expected a list of names, got {names!r}")
    return tuple(names)


def _config_digest(config: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16).hexdigest()


def check_saved_config(model_id: str, saved: Mapping[str, Any], missing: list[str], weights: Path) -> None:
    """ValueError where config.json is not the one that was saved with the weights.

    Weights of an earlier version, without a digest of the config, need all of its options: none may be missing.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="pt") as file:
            recorded = (file.metadata() or {}).get("config")
    except SafetensorError:
        return  # said of the weights when they are read
    if recorded is None and missing:
        raise ValueError(
            f"{model_id}: config.json: expected all options of the model, got none for {', '.join(missing)}"
        )
    if recorded is not None and recorded != _config_digest(saved):
        got = f"a file without {', '.join(missing)}" if missing else "other ones"
        raise ValueError(
            f"{model_id}: config.json: expected the options that were saved with the weights, got {got}; "
            "config=... replaces them"
        )
