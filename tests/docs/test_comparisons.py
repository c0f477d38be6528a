"""docs/comparisons.md and the scripts that measure its rows."""

from __future__ import annotations

import random
import sys

import pytest

from benchmarks import comparisons, likelihoods, text_bits


def test_the_page_has_what_the_records_have() -> None:
    assert comparisons.PAGE.read_text(encoding="utf-8") == comparisons.page()


def test_the_standard_library_is_a_text_that_ends_with_a_line() -> None:
    text = text_bits.standard_library(20_000)
    assert text == text_bits.standard_library(20_000)
    assert 15_000 < len(text.encode()) <= 20_000
    assert text.endswith("\n")
    assert "import" in text


def test_compressed_bits_are_of_the_held_out_part() -> None:
    """A part that repeats the training text costs next to nothing after it; random letters cost log2(26) bits."""
    letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=6000))
    bits = text_bits.compressed_bits(letters, letters)
    assert bits["xz"]["after the training text"] < 0.2
    assert 4.6 < bits["xz"]["alone"] < 5.5
    assert 4.6 < text_bits.compressed_bits("", letters)["bzip2"]["alone"] < 5.5


def test_rows_are_tables_of_figures_with_intervals() -> None:
    names = ("negative ELBO", "-log p(x), 50 samples", "-log p(x), 5000 samples")
    figures = dict.fromkeys(names, (100.04, 1.26))
    record = {"model": "vae", "binarization": "static", "parameters": 1234, "cpu_minutes": 0.5, **figures}
    *_, row = likelihoods.table([record])
    assert row == "| vae | static | 1,234 | 100.0 ± 1.3 | 100.0 ± 1.3 | 100.0 ± 1.3 | 0.5 |"
    assert ("vae", "static") in likelihoods.rows()


def test_without_pythae_its_rows_are_left_out_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pythae", None)
    assert likelihoods.available([*likelihoods.OURS, *likelihoods.THEIRS]) == list(likelihoods.OURS)
    assert capsys.readouterr().out == likelihoods.INSTALL + "\n"
    assert likelihoods.available(["vae"]) == ["vae"]
    assert capsys.readouterr().out == ""
