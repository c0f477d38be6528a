"""The layers of the package: a module imports only lower layers, and no other family of operators."""

from __future__ import annotations

import ast
from pathlib import Path

import fastgen

PACKAGE = Path(fastgen.__file__).parent

LAYERS = [
    ("random", "checks", "version", "_dynamo"),
    ("reference",),
    ("backend",),
    ("ops.transforms", "ops._batching", "ops._checks", "ops._contents", "ops._direct"),
    ("ops.autograd",),
    ("ops.attention", "ops.latent", "ops.projection", "ops.recurrent"),
    ("ops",),
    ("batch",),
    ("functional",),
    ("nn", "losses"),
    ("models", "integrations", "metrics", "data"),
    ("environment",),
    ("testing", "bench", "train"),
    ("cli",),
    ("__main__", ""),
]
"""Packages and modules of fastgen, from the lowest layer up. The last is the package's own ``__init__``."""

APART = ("ops.attention", "ops.latent", "ops.projection", "ops.recurrent")
"""In one layer, but without imports of each other."""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def place(module: str) -> tuple[int, str] | None:
    """The layer of a module, and the longest name in LAYERS that contains it."""
    found = [(len(name), level, name) for level, names in enumerate(LAYERS) for name in names if within(module, name)]
    return max(found)[1:] if found else None


def within(module: str, name: str) -> bool:
    return module == name or (name != "" and module.startswith(name + "."))


def imported_modules(path: Path) -> set[str]:
    """Modules of fastgen that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    known = {module_of(file) for file in PACKAGE.rglob("*.py")}
    out = set()
    for name in names:
        module = name.removeprefix("fastgen.") if name.startswith("fastgen.") else "" if name == "fastgen" else None
        while module and module not in known:  # a name that a module defines
            module = module.rpartition(".")[0]
        if module is not None:
            out.add(module)
    return out


def test_every_module_has_a_layer_and_imports_only_lower_ones() -> None:
    wrong, seen = [], 0
    for path in sorted(PACKAGE.rglob("*.py")):
        module = module_of(path)
        here = place(module)
        assert here is not None, f"{module} is in no layer of LAYERS"
        for target in imported_modules(path) - {module}:
            there = place(target)
            assert there is not None, target
            seen += 1
            across = here[1] in APART and there[1] in APART and here[1] != there[1]
            if there[0] > here[0] or across:
                wrong.append(f"{module} imports {target}")
    assert not wrong
    assert seen > 200


def test_nothing_in_the_package_imports_the_oracle() -> None:
    """``fastgen/__init__.py`` names it among its submodules; only tests and benchmarks use it."""
    users = {module_of(path) for path in PACKAGE.rglob("*.py") if "reference" in imported_modules(path)}
    assert users <= {""}
    assert imported_modules(PACKAGE / "reference.py") <= {"random"}
