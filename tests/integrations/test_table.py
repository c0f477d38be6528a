"""The table of docs/integrations.md has the models that are tested."""

from __future__ import annotations

from pathlib import Path

from tests.integrations import diffusers_models, timm_models, torchvision_models, transformers_models

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
HEAD = [
    "| library | model | outputs | gradients | R1, before / after | JVP, before / after | generate | compile |",
    "|---|---|---|---|---|---|---|---|",
]
ROWS = [
    *transformers_models.rows(),
    *diffusers_models.rows(),
    *timm_models.rows(),
    *torchvision_models.rows(),
]


def test_the_table_has_the_tested_models() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(HEAD[0])
    table = [line for line in lines[start:] if line.startswith("|")][: 2 + len(ROWS)]
    assert table == HEAD + ROWS
