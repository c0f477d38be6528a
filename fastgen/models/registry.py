"""Models by name, those of the zoo and your own: ``register_model``, ``list_models``, ``create_model``; ``load``."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from pathlib import Path
from typing import Any, TypeVar, cast

from fastgen.batch import KINDS
from fastgen.checks import require_choice
from fastgen.models.base import GenerativeModel, require_options

Model = TypeVar("Model", bound=type[GenerativeModel])

MODELS: dict[str, type[GenerativeModel]] = {}
"""Registered model classes by the name that ``fastgen train`` takes."""


def register_model(model_class: Model) -> Model:
    """Class decorator that makes a model available by its ``name``.

    Args:
        model_class: a subclass of ``GenerativeModel`` with ``name``, ``summary``, ``kind`` and ``config_class``,
            a frozen dataclass.

    Returns:
        The class itself.

    Raises:
        TypeError: it is no subclass of ``GenerativeModel``, or lacks one of these attributes.
        ValueError: another class is registered under this name.

    Example::

        @register_model
        class MyModel(GenerativeModel):
            name, summary, kind, config_class = "my-model", "one line for fastgen models", "images", MyConfig
    """
    if not (isinstance(model_class, type) and issubclass(model_class, GenerativeModel)):
        raise TypeError(f"model_class: expected a subclass of GenerativeModel, got {model_class!r}")
    for name in ("name", "summary", "kind", "config_class"):
        if not hasattr(model_class, name):
            raise TypeError(f"{model_class.__name__}: expected a class attribute {name!r}, got none")
    if not dataclasses.is_dataclass(model_class.config_class):
        raise TypeError(f"{model_class.__name__}.config_class: expected a dataclass, got {model_class.config_class!r}")
    known = MODELS.get(model_class.name)
    if known is not None and _origin(known) != _origin(model_class):
        raise ValueError(
            f"{model_class.__name__}.name: expected a name that is not registered, got {model_class.name!r}, which is"
            f" {known.__module__}.{known.__name__}"
        )
    MODELS[model_class.name] = model_class
    return model_class


def _origin(model_class: type) -> tuple[str, str]:
    """A module that is reloaded replaces its own classes."""
    return model_class.__module__, model_class.__qualname__


def list_models(pattern: str = "*", *, kind: str | None = None) -> list[str]:
    """Names of the registered models, sorted.

    Args:
        pattern: a shell-style pattern, for example ``"*gan*"``.
        kind: only models of this kind of data: ``"images"``, ``"pairs"``, ``"domains"``, ``"text"``, ``"sequences"``
            or ``"audio"``.

    Raises:
        ValueError: ``kind`` is none of these.

    Example:
        >>> list_models("*vae*")
        ['conv-vae', 'cvae', 'flow-vae', 'vae', 'vq-vae']
    """
    if kind is not None:
        require_choice("kind", kind, KINDS)
    found = sorted(fnmatch.filter(MODELS, pattern))
    return [name for name in found if kind is None or kind in (MODELS[name].kinds or (MODELS[name].kind,))]


def find_model(name: str) -> type[GenerativeModel]:
    """The class of a registered model.

    Raises:
        ValueError: there is no model of this name.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), MODELS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"name: expected one of {', '.join(sorted(MODELS))}, got {name!r}{hint}")
    return MODELS[name]


def create_model(name: str, **options: Any) -> GenerativeModel:
    """A new model with random weights.

    Args:
        name: one of ``list_models()``.
        options: fields of the model's config that differ from their defaults (``fastgen models NAME`` lists them).

    Raises:
        ValueError: there is no such model, or an option is out of range.
        TypeError: the model has no such option.

    Example:
        >>> create_model("dcgan", image_size=64, channels=3).sample(2).shape
        torch.Size([2, 3, 64, 64])
    """
    model_class = find_model(name)
    require_options(name, options, model_class.config_class)
    return model_class(model_class.config_class(**options))


def load(path: str | Path, **options: Any) -> GenerativeModel:
    """A saved model of any class, in evaluation mode. Loading runs no code.

    Args:
        path: a run's folder, one that ``save_pretrained`` wrote, or "owner/name" on the Hugging Face Hub.
        options: as for ``GenerativeModel.from_pretrained``, such as ``map_location``.

    Raises:
        FileNotFoundError: there is no such folder, or no model in it. ValueError: the files are damaged, or the model
            is of a class of your own: call that class's ``from_pretrained``.

    Example::

        images = fastgen.load("runs/digits").sample(16)  # (16, channels, size, size), in [0, 1]
    """
    return cast(GenerativeModel, GenerativeModel.from_pretrained(path, **options))
