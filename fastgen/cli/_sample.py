"""``fastgen sample RUN``."""

from __future__ import annotations

from pathlib import Path

from fastgen.batch import TRANSLATED
from fastgen.cli._errors import USAGE, CommandError
from fastgen.cli._models import add_model_option, given_model, model_class
from fastgen.cli._options import add_fields, options_parser, parse, run_folder
from fastgen.models import Texts
from fastgen.train.errors import UsageError
from fastgen.train.run import choose_device
from fastgen.train.trained import (
    SUFFIXES,
    input_items,
    is_folder,
    open_run,
    sample,
    write_samples,
    write_single_samples,
)

MOST_CLASSES = 20
ABOUT = "Generate samples with a trained model, or translate images. RUN --help lists the model's own options."


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
        given = parse(parser, _numbered_label(argv[1:], folder.classes()), defaults=True)
        del given["model"]
        items = input_items(trained, folder, given.pop("input", ""))
        n, out, seed, device = (given.pop(name) for name in ("n", "out", "seed", "device"))
        single = is_folder(out)
        if out and not single and not Path(out).parent.is_dir():
            raise CommandError(f"out: expected a path in a folder that exists, got {out}", USAGE)
        try:
            options = trained.model.sampling_class(**given)
        except (TypeError, ValueError) as error:
            raise CommandError(str(error), USAGE) from error
        trained.model.to(choose_device(device))
        samples = sample(trained, n, options, seed, items)
        if isinstance(samples, Texts) and not out:
            print("\n\n".join(samples.texts))
            return
        path = Path(out or "samples" + SUFFIXES[type(samples)])
        if single:
            write_single_samples(samples, path)
        else:
            write_samples(samples, path)
    except UsageError as error:
        raise CommandError(str(error), USAGE) from error
    print(path)


def _numbered_label(argv: list[str], classes: list[str]) -> list[str]:
    """The arguments with the name of a class after --label as its number. A whole number is a number as it is."""
    out = list(argv)
    for i, word in enumerate(argv):
        value = word.removeprefix("--label=") if word.startswith("--label=") else None
        if word == "--label" and i + 1 < len(argv):
            value, i = argv[i + 1], i + 1
        if value is None or value.lstrip("-").isdigit():
            continue
        if value not in classes:
            known = ", ".join(classes[:MOST_CLASSES]) + (", ..." if len(classes) > MOST_CLASSES else "")
            raise CommandError(f"label: expected a class, {known or 'by its number'}, got {value}", USAGE)
        out[i] = f"--label={classes.index(value)}" if out[i].startswith("--") else str(classes.index(value))
    return out
