"""Adapts the package's docstrings to what mkdocstrings parses, before it parses them.

``Example:`` becomes the section ``Examples:``. An argument line for several names (``mu, logvar: ...``) becomes a line for
each, so that every name is checked against the signature; so does a line of several exceptions
(``TypeError: ... ValueError: ...``).
"""

from __future__ import annotations

import re
from typing import Any

import griffe

NAMES = re.compile(r"^( {4})(\w+(?:, \w+)+): (.*(?:\n {8,}.*)*)", re.MULTILINE)
RAISES = re.compile(r"^Raises:\n((?: {4}.*(?:\n|\Z))+)", re.MULTILINE)


def one_line_each(section: re.Match[str]) -> str:
    if not re.match(r" +\w+: ", section[1]):  # "As forward." names no exception: a sentence, not a section
        return f"Raises: {section[1].strip()}\n"
    text = re.sub(r"\n +(?=\S)(?!\w+(?:, \w+)*: )", " ", section[1].rstrip("\n"))
    return "Raises:\n" + re.sub(r"(?<=\.) (\w+): ", r"\n    \1: ", text) + "\n"


def adapted(text: str) -> str:
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = RAISES.sub(one_line_each, text)
    return NAMES.sub(lambda m: "\n".join(f"{m[1]}{name}: {m[3]}" for name in m[2].split(", ")), text)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = adapted(obj.docstring.value)
