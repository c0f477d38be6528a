"""Adapts the package's docstrings to what mkdocstrings parses, before it parses them.

``Example:`` becomes the section ``Examples:``, and an argument line for several names (``mu, logvar: ...``) becomes a
line for each, so that every name is checked against the signature.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SEVERAL = re.compile(r"^( {4})(\w+(?:, \w+)+): (.*(?:\n {8,}.*)*)", re.MULTILINE)


def adapted(text: str) -> str:
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return SEVERAL.sub(lambda m: "\n".join(f"{m[1]}{name}: {m[3]}" for name in m[2].split(", ")), text)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = adapted(obj.docstring.value)
