"""``fastgen data PATH``."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fastgen.batch import KINDS
from fastgen.cli._errors import USAGE, CommandError
from fastgen.cli._options import add_fields, options_parser, parse
from fastgen.data import SOURCES, DataConfig, describe
from fastgen.models import Images
from fastgen.train.errors import UsageError
from fastgen.train.trained import check_out, sample_suffixes, write_samples

ABOUT = (
    "Inspect a dataset before training on it: a bundled one, a path, or hf:NAME. Without one, list the bundled ones."
)


def run(argv: list[str]) -> None:
    if not argv:
        width = max(map(len, SOURCES))
        for name, about in SOURCES.items():
            print(f"{name:<{width}}  {about}")
        return
    parser = options_parser("fastgen data", ABOUT)
    parser.add_argument("source", type=str, help="a bundled dataset, a path, or hf:NAME")
    parser.add_argument(
        "--kind", type=str, default="", help=f"kind of data: one of {', '.join(KINDS)}; default: the first that fits"
    )
    parser.add_argument("--out", type=str, default="", help="PNG file for some of the images")
    add_fields(parser, DataConfig, without=["source"])
    given = parse(parser, argv, defaults=True)
    kind, out = given.pop("kind"), given.pop("out")
    if kind and kind not in KINDS:
        raise CommandError(f"kind: expected one of {', '.join(KINDS)}, got {kind}", USAGE)
    try:
        if out:
            check_out(Path(out), sample_suffixes("images"))
        config = DataConfig(**given)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error), USAGE) from error
    found = describe(config, kind or None)
    print(found)
    if out:
        images = next(
            (value for value in found.examples.values() if isinstance(value, Tensor) and value.dim() == 4), None
        )
        if images is None:
            raise CommandError(f"out: expected a dataset of images, got one of kind {found.kind}", USAGE)
        try:
            write_samples(Images(images), Path(out))
        except UsageError as error:
            raise CommandError(str(error), USAGE) from error
        print(out)
