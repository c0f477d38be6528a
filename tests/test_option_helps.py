"""Helps of options are noun phrases: a lint over every config class that becomes a command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from fastgen.models import MODELS

FORBIDDEN = ("of", "in", "from", "what", "as", "by", "to", "on", "that", "with")
"""First words of helps without a noun ("of AdamW")."""  # word-lint: ok


def config_classes() -> Iterator[tuple[str, type]]:
    """(where, class): models, their sampling options, training, data, evaluation."""
    for name, model in MODELS.items():
        yield f"model {name}", model.config_class
        yield f"sampling of {name}", model.sampling_class
    from fastgen.data import DataConfig
    from fastgen.train.config import TrainConfig
    from fastgen.train.evaluate import EvaluateConfig

    yield from (("training", TrainConfig), ("data", DataConfig), ("evaluation", EvaluateConfig))


def problems_of(help: str) -> Iterator[str]:
    if not help.strip():
        yield "no help"
        return
    first = help.split()[0].strip(",:;").lower()
    if first in FORBIDDEN:
        yield f"begins with {first!r}"
    if help != help.strip():
        yield "surrounding white space"
    if help.endswith(".") and not help.endswith("..."):
        yield "trailing period"
    if not help.isascii():
        yield "not ASCII"


def problems() -> dict[str, list[str]]:
    """By the place of the option: what is wrong with its help."""
    found: dict[str, list[str]] = {}
    for where, config in config_classes():
        for field in dataclasses.fields(config):
            for problem in problems_of(str(field.metadata.get("help", ""))):
                place = f"{config.__module__}.{config.__name__}.{field.name}"
                found.setdefault(f"{place} ({problem}): {field.metadata.get('help')!r}", []).append(where)
    return found


@pytest.mark.parametrize(
    ("help", "problem"),
    [
        ("", "no help"),
        ("of AdamW", "begins with 'of'"),  # word-lint: ok
        ("From the data", "begins with 'from'"),
        ("AdamW beta1.", "trailing period"),
        ("AdamW \N{GREEK SMALL LETTER BETA}1", "not ASCII"),
        ("AdamW beta1", None),
        ("device: cpu, cuda, ...", None),
    ],
)
def test_the_lint_finds_helps_that_are_no_noun_phrases(help: str, problem: str | None) -> None:
    assert list(problems_of(help)) == ([] if problem is None else [problem])


def test_every_option_has_a_help_that_is_a_noun_phrase() -> None:
    pytest.importorskip("accelerate")
    found = problems()
    assert not found, "\n".join(found)


if __name__ == "__main__":  # for make lint
    for line, where in problems().items():
        print(f"{line}  [{', '.join(where)}]")
    raise SystemExit(1 if problems() else 0)
