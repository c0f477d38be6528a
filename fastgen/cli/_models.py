"""``fastgen models [MODEL]``."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

from fastgen.cli._config import nearest
from fastgen.cli._errors import USAGE, CommandError
from fastgen.cli._options import options_parser, parse
from fastgen.models import MODELS, GenerativeModel, list_models
from fastgen.models.sizes import USUAL_ITEMS, DataSize
from fastgen.train.presets import PRESETS

WIDTH = 118


def run(argv: list[str]) -> None:
    parser = options_parser("fastgen models", "List the models, or describe one.", files=False)
    parser.add_argument("model", type=str, nargs="?", default="", help="name of a model, or path/to/file.py:MyModel")
    name = parse(parser, argv, defaults=True)["model"]
    if not name:
        width = max(map(len, MODELS))
        for name in list_models():
            model = MODELS[name]
            print(f"{name:<{width}}  {model.summary} (data: {_kinds(model)}, by default {model.default_data})")
        print("\npresets, for fastgen train MODEL --preset NAME:")
        print("\n".join(f"  {name:<{width}}{preset.about}" for name, preset in PRESETS.items()))
        return
    print(_about(name, model_class("models", name)))


def model_class(command: str, name: str) -> type[GenerativeModel]:
    """The class of a registered model, or of one in the user's file: path/to/file.py:MyModel.

    The file is run as Python code, so only a name that the user typed may come here, never one that a run recorded.

    Raises:
        CommandError: no such model, file or class, or an error in the file.
    """
    if name in MODELS:
        return MODELS[name]
    file, _, wanted = name.rpartition(":")
    if not file.endswith(".py"):
        near = nearest(name.lower().replace("_", "-"), MODELS)
        hint = f"; did you mean {near}?" if near else ""
        hint = "; a class of your own is named path/to/file.py:MyModel" if name.endswith(".py") else hint
        raise CommandError(f"{command}: expected a model, one of {', '.join(list_models())}, got {name}{hint}", USAGE)
    module = _load(Path(file))
    models = {
        each.__name__: each
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, GenerativeModel) and each.__module__ == module.__name__
    }
    if wanted not in models:
        known = ", ".join(models) or "none"
        raise CommandError(f"{name}: expected a subclass of GenerativeModel in {file} ({known}), got {wanted!r}", USAGE)
    found = models[wanted]
    for attribute in ("name", "summary", "kind", "config_class"):
        if not hasattr(found, attribute):
            raise CommandError(f"{name}: expected a class attribute {attribute!r}, got none", USAGE)
    return found


def add_model_option(parser: Any) -> None:
    """The option that names the model of a run whose model is not registered."""
    parser.add_argument(
        "--model", type=str, default="", help="model of the run, path/to/file.py:MyModel, if it is your own"
    )


def given_model(argv: list[str]) -> str:
    """The value of ``--model`` among the arguments; "" if there is none. For commands whose options depend on it."""
    for word, value in zip(argv, [*argv[1:], ""], strict=True):
        if word == "--model":
            return value
        if word.startswith("--model="):
            return word.removeprefix("--model=")
    return ""


def _load(path: Path) -> ModuleType:
    """Run a file as a module of its own name; modules beside it can be imported, too."""
    if not path.is_file():
        raise CommandError(f"{path}: expected a Python file with a model, got a path where there is no file", USAGE)
    path = path.resolve()
    before = sys.modules.get(path.stem)
    taken = before is not None and getattr(before, "__file__", None) != str(path)
    name = f"fastgen_file_{path.stem}" if taken else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise CommandError(
            f"{path}: expected a Python file with a model, got {type(error).__name__}: {error}"
        ) from error
    return module


def _kinds(model: type[GenerativeModel]) -> str:
    return " or ".join(model.kinds or (model.kind,))


def _about(name: str, model: type[GenerativeModel]) -> str:
    """Description of a model, its data, its options, and the commands that train and sample it."""
    description = (sys.modules[model.__module__].__doc__ or "").strip()
    default = getattr(model, "default_data", "")
    blocks = [
        f"{model.name}: {model.summary}",
        description,
        f"data: {_kinds(model)}"
        + (f", by default {default}" if default else "")
        + f"\nclass: {_place(model)}, {_place(model.config_class)}",
        "model options, for fastgen train:\n" + _options(model.config_class, "--model."),
    ]
    if dataclasses.fields(model.sampling_class):
        blocks.append("sampling options, for fastgen sample:\n" + _options(model.sampling_class, "--"))
    if model.train_defaults:
        blocks.append(
            "training defaults: " + ", ".join(f"--{_dashed(n)} {_shown(v)}" for n, v in model.train_defaults.items())
        )
    if model.sizes:
        blocks.append(f"for more and larger data (--dry-run shows what is chosen):\n{_sizes(model)}")
    blocks.append(
        f"fastgen train {name} --data {default or 'PATH'} --out runs/{model.name}\n"
        f"fastgen sample runs/{model.name}{'' if name in MODELS else f' --model {name}'}\n"
        f"fastgen train {name} --help   lists the training options, too"
    )
    return "\n\n".join(blocks)


def _sizes(model: type[GenerativeModel]) -> str:
    """Options for 10,000 images of usual sizes."""
    rows = []
    for size in (28, 64):
        options = model.suggested(DataSize("images", USUAL_ITEMS, size, 1))
        words = " ".join(f"--{_dashed(name)} {_shown(value)}" for name, value in options.items())
        rows.append(textwrap.fill(f"  images of {size}x{size}: {words}", WIDTH, subsequent_indent="    "))
    return "\n".join(rows)


def _place(kind: type) -> str:
    """The path to import it from."""
    module = kind.__module__
    return f"{'fastgen.models' if module.startswith('fastgen.models.') else module}.{kind.__name__}"


def _options(config: type, prefix: str) -> str:
    types = get_type_hints(config)
    rows = []
    for field in dataclasses.fields(config):
        if field.metadata.get("from_data"):
            continue
        choices = [str(choice) for choice in get_args(types[field.name]) if isinstance(choice, str)]
        text = field.metadata.get("help", "") + (f": {', '.join(choices)}" if choices else "")
        rows.append((prefix + _dashed(field.name), f"{text} (default {_shown(field.default)})"))
    width = max((len(option) for option, _ in rows), default=0)
    return "\n".join(
        textwrap.fill(text, WIDTH, initial_indent=f"  {option:<{width}}  ", subsequent_indent=" " * (width + 4))
        for option, text in rows
    )


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else "empty" if value == "" else str(value)
