"""Examples in the docstrings of ``fastgen.nn``."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import fastgen.nn

MODULES = [info.name for info in pkgutil.iter_modules(fastgen.nn.__path__) if not info.name.startswith("_")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(f"fastgen.nn.{name}")
    results = doctest.testmod(module, extraglobs={"torch": torch, "functional": fastgen.functional})
    assert results.attempted > 0
    assert results.failed == 0
