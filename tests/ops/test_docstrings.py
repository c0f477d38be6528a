"""The examples in the docstrings of the public functions run."""

from __future__ import annotations

import doctest

import pytest
import torch

import fastgen
from fastgen import functional


@pytest.mark.parametrize("name", functional.__all__)
def test_the_example_in_the_docstring_runs(name):
    names = {"torch": torch, "fastgen": fastgen, **{each: getattr(functional, each) for each in functional.__all__}}
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(functional, name), name, globs=names)
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
