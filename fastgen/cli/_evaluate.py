"""``fastgen evaluate RUN``."""

from __future__ import annotations

from fastgen.cli._errors import USAGE, CommandError
from fastgen.cli._options import add_fields, options_parser, parse, run_folder
from fastgen.train.errors import UsageError
from fastgen.train.evaluate import EvaluateConfig, evaluate

ABOUT = "Judge a trained model on held-out items. Nothing is downloaded; figures go into the run's folder, too."


def run(words: list[str]) -> None:
    parser = options_parser("fastgen evaluate", ABOUT)
    parser.add_argument("run", type=str, help="the run's folder")
    add_fields(parser, EvaluateConfig)
    given = parse(parser, words, defaults=True)
    folder = run_folder(given.pop("run"))
    try:
        config = EvaluateConfig(**given)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error), USAGE) from error
    try:
        figures = evaluate(folder, config)
    except UsageError as error:
        raise CommandError(str(error), USAGE) from error
    if not figures:
        raise CommandError("evaluate: expected a model with figures of its own, or one of images, got neither")
    for figure in figures:
        print(figure)
    print(folder.report)
