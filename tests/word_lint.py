"""Finds retired phrases of docs/glossary.md in code and documentation, and option helps that are not noun phrases.

usage: python tests/word_lint.py [FILE ...]     (default: every file that git tracks)

Exits with 1 where there are any. A line that must keep a phrase (an old name that is still accepted) says
``word-lint: ok`` in a comment.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".py", ".md", ".h", ".cpp", ".cu", ".cuh", ".j2", ".sh", ".yml", ".toml")
LEFT_OUT = (
    "CHANGELOG.md",
    "docs/glossary.md",
    "tests/word_lint.py",
    "tests/docs/test_words.py",
    "benchmarks/results/",
    "tests/models/saved/",
)
OK = "word-lint: ok"

PHRASES = {
    r"\bof (the \w+'s )?AdamW\b": "AdamW beta1, AdamW learning rate, ...",
    r"\bthe games?\b|\bfive games\b|\bGameConfig\b": "adversarial loss, adversarial objective",
    r"\b(two|both) players?\b|\bboth play\b|\bhow \w+ plays?\b": "generator and discriminator, both networks",
    r"\bturned heads?\b|\bheads?( are| is)?( \w+ and)? turned\b|\bthe turn\b": "rotary embedding (RoPE)",
    r"\bwhose end does\b|\bHeadFinish\b": "epilogue",
    r"\bshared? out\b|\bshares out\b": "launch plan",
    r"\bslopes?\b(?! of the (leaky|negative))": "gradient norm, gradient penalty",
    r"\bin the box\b|\bthe box's\b": "bundled",
    r"\bjudge[sd]?\b|\bjudging\b": "evaluate",
    r"\bcodebook's words?\b|\bwords of a\b.*codebook|\bprior over its words\b": "codes, codebook entries",
    r"\bdifferentiated (twice|forwards)\b|\btwice or forwards\b": "twice differentiable, forward-mode AD",
    r"\bas often as you (need|like)\b": "derivatives of every order",
    r"\bhalvings?\b": "num_downsamples, downsampling",
    r"\bwidened\b": "upcast, cast to float32",
    r"\b(numbers|figures) in (z|a code)\b": "latent dimension, code dimension",
    r"\bpass(es)? by\b(?! (value|reference|position|keyword|name))": "are iterated",
    r"\bhidden keys?\b|\bsees? no key\b|\bkeys? (are|is) (all )?hidden\b": "masked keys, a fully masked row",
    r"\bdescribed at the top of this file\b": "a docstring that describes the class",
    r"\bnames the field, what was expected\b": "a Raises section, where useful",
    r"\b(is|are|was|were|being) told\b|\bhears? of\b|\bseen by\b|\bsees\b": "takes, receives, attends to, depends on",
    r"\bcomes of (it|them)\b|\bgone through\b": "results; is iterated",
    r"\bnobody\b(?! wrote)": "no thread, no test, ...; or the passive",
    r"\bMoment\b|\bExhibit\b|\bWish\b": "StepContext, Samples, StopRequest",
    r"\bfastgen_reference\b": "fastgen_torch",
    r"\blearnt\b": "learned",
    r"\w*(colour|neighbour|behaviour)\w*|(?<!blue )\bgrey\w*": "American spelling",
    r"\w*(summar|normal|initial|synchron|quant|parametr|minim|maxim|optim)is(e|ing|ation)\w*": "American spelling",
}
RULES = [
    (re.compile(pattern, re.IGNORECASE if pattern.islower() else 0), instead) for pattern, instead in PHRASES.items()
]

HELP_BEGINS = re.compile(r"(of|in|from|that|what|as|by|to|on)\b")
HELP_FUNCTIONS = ("option", "_option", "add_argument", "OptionHelp")


def files(given: list[str]) -> list[Path]:
    if given:
        return [Path(name).resolve() for name in given]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    return [ROOT / name for name in listed if name.endswith(SUFFIXES) and not name.startswith(LEFT_OUT)]


def phrases(text: str) -> Iterator[tuple[int, str, str]]:
    """Line, phrase and replacement. Names of functions are read as words."""
    for number, line in enumerate(text.splitlines(), 1):
        if OK not in line:
            line = line.replace("_", " ") if line.lstrip().startswith("def ") else line
            for rule, instead in RULES:
                for found in rule.finditer(line):
                    yield number, found[0], instead


def helps(source: str) -> Iterator[tuple[int, str, str]]:
    """Option helps that begin with a preposition."""
    for node in ast.walk(ast.parse(source)):
        if (
            not isinstance(node, ast.Call)
            or getattr(node.func, "attr", getattr(node.func, "id", "")) not in HELP_FUNCTIONS
        ):
            continue
        texts = [keyword.value for keyword in node.keywords if keyword.arg == "help"]
        texts += node.args[1:2] if getattr(node.func, "id", "").endswith("option") else []
        for text in texts:
            if isinstance(text, ast.JoinedStr) and text.values:
                text = text.values[0]
            if isinstance(text, ast.Constant) and isinstance(text.value, str) and HELP_BEGINS.match(text.value):
                yield node.lineno, f"help {text.value[:40]!r}", "a noun phrase that says what the option is"


def main() -> int:
    count = 0
    for path in files(sys.argv[1:]):
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        found = list(phrases(text))
        if path.suffix == ".py":
            found += helps(text)
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        for line, phrase, instead in sorted(found):
            print(f"{name}:{line}: {phrase}  (write: {instead})")
        count += len(found)
    if count:
        print(f"{count} retired phrases; docs/glossary.md has the words")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
