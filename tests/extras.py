"""Packages of the extra ``fastgen[train]`` that are not installed: tests of data and training are then left out."""

from __future__ import annotations

import importlib.util

from fastgen.cli import EXTRAS

MISSING = [package for module, package in EXTRAS.items() if importlib.util.find_spec(module) is None]
