"""``fastgen evaluate RUN``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastgen.cli._errors import USAGE, CommandError
from fastgen.cli._models import add_model_option, model_class
from fastgen.cli._options import add_fields, options_parser, parse, run_folder
from fastgen.metrics import Metric
from fastgen.train.errors import UsageError
from fastgen.train.evaluate import EvaluateConfig, evaluate

ABOUT = "Evaluate a trained model on held-out items. Downloads nothing; the metrics are also saved in the run's folder."


def run(argv: list[str]) -> None:
    parser = options_parser("fastgen evaluate", ABOUT)
    parser.add_argument("run", type=str, help="folder of the run")
    add_model_option(parser)
    add_fields(parser, EvaluateConfig)
    given = parse(parser, argv, defaults=True)
    folder, model = run_folder(given.pop("run")), given.pop("model")
    try:
        config = EvaluateConfig(**given)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error), USAGE) from error
    try:
        metrics = evaluate(folder, config, model_class("evaluate", model) if model else None, quiet=False)
    except UsageError as error:
        raise CommandError(str(error), USAGE) from error
    if not metrics:
        raise CommandError(
            "evaluate: expected a model with likelihoods, or one of images, pairs, domains or audio, got neither"
        )
    print("\n".join(_lines(metrics)))
    print(folder.report)


def _lines(metrics: Sequence[Metric]) -> Iterator[str]:
    """A line for each metric. The feature space of the metrics is named once, above them."""
    space = ""
    for metric in metrics:
        if metric.space and metric.space != space:
            yield f"in the feature space {metric.space}:"
        space = metric.space
        line = str(metric)
        yield "  " + line.replace(f"  in {space}, ", "  ", 1).removesuffix(f"  in {space}") if space else line
