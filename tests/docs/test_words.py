"""The word lint finds what it should, and lets pass what it should not find."""

from __future__ import annotations

import pytest

from tests import word_lint


@pytest.mark.parametrize(
    "line",
    [
        *("learning rate of AdamW", "the game", "heads are turned", "differentiated twice", "num = halvings"),
        *("in the box", "def normalise_heads():", "Neighbourhoods", "colours", "grey pixels", "minimising"),
    ],
)
def test_a_retired_phrase_is_found(line: str) -> None:
    assert list(word_lint.phrases(line))


@pytest.mark.parametrize(
    "line",
    [
        *("AdamW beta1", "twice differentiable", "passed by value", "negative_slope=0.2", "halvings  # word-lint: ok"),
        *("raise", "noise", "promises", "normalizes", "primary: blue grey"),
    ],
)
def test_the_field_s_own_terms_pass(line: str) -> None:
    assert not list(word_lint.phrases(line))


@pytest.mark.parametrize(
    "source",
    [
        'x = option(1, "of AdamW")',
        'parser.add_argument("--n", help="in steps")',
        'option(1, f"to {n}", from_data=True)',
    ],
)
def test_a_help_that_begins_with_a_preposition_is_found(source: str) -> None:
    assert list(word_lint.helps(source))


def test_a_help_that_is_a_noun_phrase_passes() -> None:
    assert not list(word_lint.helps('option(1, "AdamW beta1"); add_argument("--n", help="number of samples")'))
