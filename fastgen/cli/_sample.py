"""``fastgen sample RUN``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastgen.batch import TRANSLATED
from fastgen.cli._errors import USAGE, CommandError
from fastgen.cli._models import add_model_option, given_model, model_class
from fastgen.cli._options import add_fields, given_under_current_names, options_parser, parse, run_folder
from fastgen.models import Samples, Texts
from fastgen.train.errors import UsageError
from fastgen.train.folder import RunFolder
from fastgen.train.image_files import output_names
from fastgen.train.run import choose_device
from fastgen.train.trained import (
    ARRAYS,
    SUFFIXES,
    Trained,
    check_out,
    check_out_folder,
    check_seed,
    input_items,
    is_folder,
    open_run,
    sample,
    sample_suffixes,
    write_samples,
    write_single_samples,
)
from fastgen.train.views import (
    COLUMNS,
    HELD_OUT,
    chosen_items,
    interpolations,
    nearest_neighbors,
    reconstructions,
    shown,
    sweep,
    write_history,
    write_latents,
)

MOST_CLASSES = 20
ABOUT = (
    "Generate samples with a trained model, or translate images. RUN --help lists the model's own options. One of"
    " --reconstruct, --encode, --interpolate, --nearest, --sweep, --show and --history produces something other than"
    " samples."
)
VIEWS = ("reconstruct", "encode", "interpolate", "nearest", "sweep", "show", "history")


def run(argv: list[str]) -> None:
    named = bool(argv) and not argv[0].startswith("-")
    helping = "--help" in argv or "-h" in argv
    if not named and not helping:
        raise CommandError(f"sample: expected a run's folder first, got {argv[0] if argv else 'nothing'}", USAGE)
    parser = options_parser("fastgen sample RUN", ABOUT)
    parser.add_argument("--n", type=int, default=64, help="number of samples")
    parser.add_argument(
        "--out",
        type=str,
        default="",
        help="output file, .npz, or a folder for single files (a path that ends in / or has no suffix); "
        "default samples.png or samples.wav; text is printed",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--device", type=str, default="auto", help="device: cpu, cuda, ...; auto: cuda if available")
    add_model_option(parser)
    _add_views(parser)
    if not named:
        parse(parser, argv, defaults=True)
        return
    try:
        folder = run_folder(argv[0])
        model = given_model(argv)
        trained = open_run(folder, "cpu", model_class("sample", model) if model else None)
        if trained.model.kind in TRANSLATED:
            parser.add_argument(
                "--input", type=str, default="", help="image or folder of images to translate; default: held-out items"
            )
        add_fields(parser, trained.model.sampling_class)
        given = _parsed(parser, argv[1:], trained, folder)
        del given["model"]
        views = {name: given.pop(name) for name in VIEWS}
        asked = [name for name in VIEWS if views[name]]
        if len(asked) > 1:
            raise CommandError(f"{', '.join(asked)}: expected one of them, got {len(asked)}", USAGE)
        n, out, seed, device = (given.pop(name) for name in ("n", "out", "seed", "device"))
        source = given.pop("input", "")
        single = is_folder(out) and not asked
        if single:
            check_out_folder(Path(out))
        elif out:
            check_out(Path(out), *_contents(asked[0] if asked else "", trained))
        try:
            options = trained.model.sampling_class(**given_under_current_names(trained.model.sampling_class, given))
        except (TypeError, ValueError) as error:
            raise CommandError(str(error), USAGE) from error
        items = input_items(trained, folder, source)
        trained.model.to(choose_device(device))
        if asked:
            print(_view(asked[0], views[asked[0]], trained, folder, options, n=n, seed=seed, out=out))
            return
        samples = sample(trained, n, options, seed, items)
        if isinstance(samples, Texts) and not out:
            print("\n\n".join(samples.texts))
            return
        path = Path(out or "samples" + SUFFIXES[type(samples)])
        if single:
            write_single_samples(samples, path, output_names(items, n))
        else:
            write_samples(samples, path)
    except UsageError as error:
        raise CommandError(str(error), USAGE) from error
    print(path)


def _parsed(parser: Any, argv: list[str], trained: Trained, folder: RunFolder) -> dict[str, Any]:
    """The options. CommandError: an invalid one; with an unknown one, the message lists those of the model."""
    own = [field.name.replace("_", "-") for field in dataclasses.fields(trained.model.sampling_class)]
    try:
        return parse(parser, _numbered_label(argv, folder.classes()) if "label" in own else argv, defaults=True)
    except CommandError as error:
        if not str(error).startswith("unrecognized arguments"):
            raise
        options = f"the sampling options {', '.join('--' + name for name in own)}" if own else "no sampling options"
        raise CommandError(f"{error}; {trained.model.name} has {options}", error.code) from error


def _add_views(parser: Any) -> None:
    parser.add_argument(
        "--reconstruct",
        type=str,
        default="",
        help=f"image, folder of images or {HELD_OUT}: rows of them above reconstructions",
    )
    parser.add_argument(
        "--encode",
        type=str,
        default="",
        help=f"image, folder of images or {HELD_OUT}, whose latents are written to .npz",
    )
    parser.add_argument(
        "--interpolate", action="store_true", help=f"rows of {COLUMNS} images between two random latents"
    )
    parser.add_argument(
        "--nearest", action="store_true", help="rows of samples above the training images nearest to them, in pixels"
    )
    parser.add_argument(
        "--sweep",
        type=str,
        default="",
        help="OPTION=VALUE,VALUE,...: the same noise with each value of an option of the model that is a number",
    )
    parser.add_argument(
        "--show", type=str, default="", help="visualization of held-out items: attention, completions, styles, ..."
    )
    parser.add_argument(
        "--history", action="store_true", help="animation (.gif) of the samples that were saved during training"
    )


def _contents(view: str, trained: Trained) -> tuple[tuple[str, ...], str]:
    """Suffixes of the files that a view, or "" for samples, can be written to, and what they hold, for messages."""
    if view == "encode":
        return (ARRAYS,), "latents"
    if view == "history":
        return (".gif",), "a history"
    if view == "show":  # its type is known when the model has made it
        return (*SUFFIXES.values(), ARRAYS), ""
    if view in ("reconstruct", "interpolate", "nearest"):
        return sample_suffixes("images"), ""
    return sample_suffixes(trained.model.kind), ""


def _view(
    view: str, value: str, trained: Trained, folder: RunFolder, options: Any, *, n: int, seed: int, out: str
) -> Path:
    """Write something other than samples; return the path of its file."""
    if view in ("encode", "history"):
        path = Path(out or {"encode": "latents.npz", "history": "samples.gif"}[view])
        if view == "history":
            write_history(folder, "samples", path)
        else:
            write_latents(trained, chosen_items(trained, folder, value), options, path)
        return path
    if n < 1:
        raise UsageError(f"n: expected a positive number of samples, got {n}")
    check_seed(seed)
    samples: Samples
    if view == "reconstruct":
        samples = reconstructions(trained, chosen_items(trained, folder, value), n, options)
    elif view == "interpolate":
        samples = interpolations(trained, n, options, seed)
    elif view == "nearest":
        samples = nearest_neighbors(trained, folder, n, options, seed)
    elif view == "sweep":
        samples = sweep(trained, n, value, options, seed)
    else:
        samples = shown(trained, folder, value, n, seed)
    path = Path(out or view + SUFFIXES[type(samples)])
    write_samples(samples, path)
    return path


def _numbered_label(argv: list[str], classes: list[str]) -> list[str]:
    """The arguments with the name of a class after --label as its number; other whole numbers are numbers already."""
    out = list(argv)
    for i, word in enumerate(argv):
        value = word.removeprefix("--label=") if word.startswith("--label=") else None
        if word == "--label" and i + 1 < len(argv):
            value, i = argv[i + 1], i + 1
        if value is None or (value not in classes and value.lstrip("-").isdigit()):
            continue
        if value not in classes:
            known = ", ".join(classes[:MOST_CLASSES]) + (", ..." if len(classes) > MOST_CLASSES else "")
            raise CommandError(f"label: expected a class, {known or 'by its number'}, got {value}", USAGE)
        out[i] = f"--label={classes.index(value)}" if out[i].startswith("--") else str(classes.index(value))
    return out
