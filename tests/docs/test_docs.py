"""The README and the pages of docs/: their code runs, their commands parse, and what they name exists."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import shlex
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fastgen.cli import main
from fastgen.models import MODELS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
OWN = "path/to/file.py:TinyVAE"
OPTIONAL = ("transformers", "peft", "diffusers", "timm", "x_transformers", "onnxscript")
GENERATED = "docs/models.md"
"""Written by benchmarks/zoo.py: its commands are those that made it."""

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REPOSITORY_PATH = re.compile(
    r"(?:fastgen|csrc|tests|benchmarks|docs|examples)/[\w./-]*\w/?"
    r"|(?:README|CONTRIBUTING|CHANGELOG|SECURITY)\.md|CITATION\.cff|constraints\.txt|mkdocs\.yml|pyproject\.toml"
)


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in BLOCK.finditer(text)]


def commands(block: Block) -> list[list[str]]:
    """The words after ``fastgen`` of each line that calls it, directly or through torchrun."""
    lines = [shlex.split(line, comments=True) for line in block.text.splitlines()]
    return [line[line.index("fastgen") + 1 :] for line in lines if "fastgen" in line]


def needs_another_library(block: Block) -> bool:
    """Whether a block imports a library of the extra ``integrations`` that cannot be imported here."""
    lines = re.findall(r"^(?:from|import) .*", block.text, re.MULTILINE)
    imported = {name for line in lines for name in re.findall(r"\w+", line)}
    return not all(can_be_imported(name) for name in imported & set(OPTIONAL))


@functools.cache
def can_be_imported(name: str) -> bool:
    """Whether a library is there and works. timm needs a torchvision that matches torch, for example."""
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True


def run_on_a_small_scale(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    """The trainings and samplings of a shell block, for two steps."""
    for words in commands(block):
        if words[0] in ("train", "sample"):
            assert main([*words, "--steps", "2"] if words[0] == "train" else words) == 0, words
    capsys.readouterr()


@pytest.mark.parametrize("page", [name for name in NAMES if any(b.language == "python" for b in blocks(name))])
def test_the_code_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order, in one namespace. A run folder that the code loads is made by the page's own commands."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = blocks(page)
    loads_a_run = any(re.search(r'(load|from_pretrained)\("runs/', block.text) for block in found)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where dataclasses find the names of their annotations
    for block in found:
        if block.language == "sh" and loads_a_run:
            run_on_a_small_scale(block, capsys)
        if block.language == "python" and not needs_another_library(block):
            # Blank lines before the code make tracebacks name the page's own lines.
            exec(compile("\n" * block.line + block.text, str(ROOT / page), "exec"), vars(module))


def options_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The options that ``fastgen COMMAND --help`` lists; those of sampling are a model's own."""
    command = [words[0], *(words[1:2] if words[0] == "train" else [])]
    assert main([*command, "--help"]) == 0, f"fastgen {' '.join(command)} --help"
    found = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out))
    if words[0] == "sample":
        fields = {field.name for model in MODELS.values() for field in dataclasses.fields(model.sampling_class)}
        found |= {"--input", *("--" + field.replace("_", "-") for field in fields)}
    return found


@pytest.mark.parametrize("page", [name for name in NAMES if name != GENERATED])
def test_the_commands_of_a_page_exist(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    prose = BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
    inline = [Block("sh", code, 0) for code in re.findall(r"`(fastgen [^`]+)`", prose)]
    for block in [b for b in blocks(page) if b.language == "sh"] + inline:
        for words in commands(block):
            if not words or words[0].isupper() or words[1:2] in (["MODEL"], [OWN]):  # placeholders
                continue
            if words[0].startswith("--"):
                assert words[0] in ("--help", "--version")
                continue
            given = {word.partition("=")[0] for word in words[1:] if word.startswith("--")} - {"--help"}
            assert given <= options_of(words, capsys), words
            if words[0] in ("models", "train") and len(words) > 1:
                assert words[1] in MODELS, words


@pytest.mark.parametrize("page", [*NAMES, "examples/README.md", "tests/emulator/README.md", "SECURITY.md"])
def test_every_repository_path_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = {path for code in re.findall(r"`([^`\n]+)`", text) for path in REPOSITORY_PATH.findall(code)}
    missing = [path for path in sorted(named) if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md"])
def test_links_outside_of_the_site_lead_somewhere(page: str) -> None:
    """Those of the site are checked by mkdocs build --strict."""
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    folder = ROOT / "docs"
    left_out = [
        page for path in folder.rglob("*.md") if (page := path.relative_to(folder).as_posix()) not in navigation
    ]
    assert not left_out


def test_versions_agree() -> None:
    import fastgen

    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {fastgen.__version__}\n" in citation
    assert f"## {fastgen.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
