"""Models as folders: config.json, model.safetensors and a model card, here or on the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import nn

from fastgen.models._checksum import UNSEALED, seal_file

if TYPE_CHECKING:

    class _HubMixin:
        def save_pretrained(self, save_directory: str | Path, **options: Any) -> None: ...
        def _save_pretrained(self, save_directory: Path) -> None: ...
        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any: ...

else:
    try:
        from huggingface_hub import PyTorchModelHubMixin as _HubMixin
    except ImportError:

        class _HubMixin:
            """Stands in where huggingface_hub is not installed."""

            def save_pretrained(self, *args: Any, **options: Any) -> None:
                raise ImportError("save_pretrained needs huggingface_hub: pip install 'fastgen[train]'")

            push_to_hub = save_pretrained

            @classmethod
            def from_pretrained(cls, *args: Any, **options: Any) -> None:
                raise ImportError("from_pretrained needs huggingface_hub: pip install 'fastgen[train]'")


CONFIG, WEIGHTS, MODEL_TYPE = "config.json", "model.safetensors", "model_type"
DRAWING = {
    "images": "model.sample(16)  # (16, channels, size, size), in [0, 1]",
    "text": "model.sample(4)  # a list of strings",
    "sequences": "model.sample(4)  # a list of strings",
    "audio": "model.sample(4)  # (4, samples), in [-1, 1]",
    "pairs": 'model.translate({"inputs": images}, model.sampling_class()).pixels  # images in [0, 1]',
    "domains": 'model.translate({"a": images}, model.sampling_class()).pixels  # images in [0, 1]',
}


class Pretrained(_HubMixin):
    """``save_pretrained``, ``from_pretrained``, ``push_to_hub``, by huggingface_hub. Reading never runs code."""

    name: ClassVar[str]
    summary: ClassVar[str]
    config_class: ClassVar[type]
    config: Any
    kind: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """The model in a folder that ``save_pretrained`` wrote, or in a repository of the Hugging Face Hub.

        It comes in evaluation mode. Of ``GenerativeModel`` itself the model has the class that its config names.

        Args:
            pretrained_model_name_or_path: a folder, such as "runs/digits/model", or "owner/name" on the Hub.
            options: map_location (a device, default "cpu"), strict (of the state dict's names, default True); of the
                Hub: revision, token, cache_dir, force_download, local_files_only.

        Raises:
            FileNotFoundError: there is no such folder, or no model in it, here or on the Hub.
            ValueError: the model there is of another class, or its files are damaged.
            ImportError: huggingface_hub is not installed.
        """
        place = str(pretrained_model_name_or_path)
        folder = Path(place).expanduser()
        if folder.is_dir():
            place = str(folder)
            chosen = _class_of(cls, _read_config(folder), place)
        elif folder.exists() or isinstance(pretrained_model_name_or_path, Path) or _is_path(place):
            came = "a file" if folder.exists() else "a path where there is no folder"
            raise FileNotFoundError(f"{place}: expected a folder that save_pretrained wrote, got {came}")
        else:
            chosen = _class_of(cls, _hub_config(place, options), place)
        return super(Pretrained, chosen).from_pretrained(place, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        """The weights, whole or not at all, with a digest of them and of the config in their metadata; the config."""
        from safetensors.torch import save_model

        config = dataclasses.asdict(self.config)
        file = save_directory / WEIGHTS
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            save_model(cast(nn.Module, self), str(temporary), {**UNSEALED, "config": _config_digest(config)})
            seal_file(temporary)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
        text = json.dumps({MODEL_TYPE: self.name, **config}, sort_keys=True, indent=2) + "\n"
        (save_directory / CONFIG).write_text(text, encoding="utf-8")

    def generate_model_card(self, *, training: str = "", **options: Any) -> Any:
        """A README.md: what the model is, its config, how to load it.

        Args:
            training: Markdown about where its weights come from.
        """
        from huggingface_hub import ModelCard

        return ModelCard(self._card(training))

    def _card(self, training: str) -> str:
        name, parameters = type(self).__name__, sum(weight.numel() for weight in _weights(self))
        rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in dataclasses.asdict(self.config).items())
        head = f"---\nlibrary_name: fastgen\ntags:\n- fastgen\n- {self.name}\n---\n\n# {self.name}\n\n"
        return head + (
            f"{self.summary[:1].upper()}{self.summary[1:]}: `{name}` of fastgen, {parameters:,} parameters.\n\n"
            f"{training or 'Nothing is recorded here of how its weights came about.'}\n\n"
            "## Use\n\n`FOLDER` is this folder, or the repository on the Hugging Face Hub that holds it:\n\n"
            f"```python\nfrom {_importable(type(self))} import {name}\n\n"
            f'model = {name}.from_pretrained("FOLDER")\n{DRAWING.get(self.kind, "")}\n```\n\n'
            f"## Config\n\n| option | value |\n|---|---|\n{rows}\n"
        )


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
    """Whether it can't be "name" or "owner/name"."""
    return place.startswith((".", "/", "~")) or "\\" in place or place.count("/") > 1 or place.endswith("/")


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        inside = folder / "model"
        hint = f"; a run's model is in {inside}" if (inside / CONFIG).is_file() else ""
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
            f" such folder, and of the Hub came: {reason}"
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
    """The class to load: that which was asked for, or for a base of several that which the config tells.

    Models that were saved before configs named their class are known by their options.
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
            f"{place}: {CONFIG}: expected a model of fastgen ({', '.join(MODELS)}), got {came}; a class of your own"
            " loads its models by its own from_pretrained"
        )
    raise ValueError(
        f"{place}: {CONFIG}: expected a config that names its class, got one of {names}; load it by that class"
    )


def _has(model: type[Pretrained], config: Mapping[str, Any]) -> bool:
    from fastgen.models.base import current_names

    return {field.name for field in dataclasses.fields(model.config_class)} == set(
        current_names(model.config_class, config)
    )


def _config_digest(config: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16).hexdigest()


def check_saved_config(model_id: str, saved: Mapping[str, Any], missing: list[str], weights: Path) -> None:
    """ValueError where config.json is not the one that was saved with the weights.

    Weights of an earlier version, without a digest of the config, need all of its options: none may be missing.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="pt") as file:
            told = (file.metadata() or {}).get("config")
    except SafetensorError:
        return  # said of the weights when they are read
    if told is None and missing:
        raise ValueError(
            f"{model_id}: config.json: expected all options of the model, got none for {', '.join(missing)}"
        )
    if told is not None and told != _config_digest(saved):
        got = f"a file without {', '.join(missing)}" if missing else "other ones"
        raise ValueError(
            f"{model_id}: config.json: expected the options that were saved with the weights, got {got}; "
            "config=... replaces them"
        )
