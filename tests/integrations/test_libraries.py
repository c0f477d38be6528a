"""How ``accelerate`` and ``restore`` find the integration of a library, with and without the library."""

from __future__ import annotations

import subprocess
import sys
import types
from importlib import metadata

import pytest
from torch import nn

import fastgen
from fastgen import integrations


@pytest.fixture
def library(monkeypatch):
    """An installed and imported library of version 2.1, and its integration, which replaces modules named Theirs."""
    module = types.ModuleType("fastgen.integrations.somelib")

    class Theirs(nn.Module):
        pass

    def report(model):
        return fastgen.AccelerationReport(
            {name: "theirs" for name, part in model.named_modules() if isinstance(part, Theirs)},
            {name: "not theirs" for name, part in model.named_modules() if isinstance(part, nn.GRU)},
        )

    module.Theirs = Theirs
    module.recognizes = lambda model: any(isinstance(part, Theirs) for part in model.modules())
    module.accelerate = module.restore = report
    module.check_restore = lambda model: None
    monkeypatch.setitem(sys.modules, "somelib", types.ModuleType("somelib"))
    monkeypatch.setitem(sys.modules, "fastgen.integrations.somelib", module)
    monkeypatch.setattr(integrations, "_LIBRARIES", {"somelib": (2, 1)})
    monkeypatch.setattr(integrations, "_version", {"somelib": "2.1.0"}.get)
    return module


def test_reports_are_merged(library):
    model = nn.ModuleDict({"a": library.Theirs(), "b": nn.GRU(2, 2)})
    report = fastgen.accelerate(model)
    assert report == fastgen.AccelerationReport({"a": "theirs", "b": "torch.nn.GRU -> fastgen.nn.GRU"}, {})
    assert fastgen.restore(model).replaced == {"a": "theirs", "b": "fastgen.nn.GRU -> torch.nn.GRU"}


def test_models_without_modules_of_the_library_are_left_to_torch(library):
    assert fastgen.accelerate(nn.ModuleDict({"b": nn.GRU(2, 2)})).kept == {}


def test_restore_changes_nothing_if_the_library_refuses(library):
    def refuse(model):
        raise RuntimeError("refused")

    library.check_restore = refuse
    model = nn.ModuleDict({"a": library.Theirs(), "b": nn.GRU(2, 2)})
    fastgen.accelerate(model)
    with pytest.raises(RuntimeError, match="refused"):
        fastgen.restore(model)
    assert type(model["b"]) is fastgen.nn.GRU


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("2.1.0", "2.1.0 (possible)"),
        ("10.0.dev0", "10.0.dev0 (possible)"),
        ("2.0.9", "version 2.0.9, expected >= 2.1"),
        (None, "not installed"),
    ],
)
def test_available(library, monkeypatch, version, state):
    monkeypatch.setattr(integrations, "_version", {"somelib": version}.get)
    assert integrations.available() == {"somelib": state}
    model = nn.ModuleDict({"a": library.Theirs()})
    assert bool(fastgen.accelerate(model).replaced) == ("possible" in state)


def test_a_library_that_was_not_imported_is_left_alone(library, monkeypatch):
    monkeypatch.delitem(sys.modules, "somelib")
    assert fastgen.accelerate(nn.ModuleDict({"a": library.Theirs()})).replaced == {}


def test_available_reads_the_versions_of_installed_packages():
    for name, state in integrations.available().items():
        try:
            assert metadata.version(name) in state
        except metadata.PackageNotFoundError:
            assert state == "not installed"


def test_no_library_is_imported():
    code = (
        "import sys, torch, fastgen; fastgen.accelerate(torch.nn.GRU(1, 1)); fastgen.integrations.available();"
        "print([name for name in fastgen.integrations._LIBRARIES if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_register_names_the_problem(monkeypatch):
    with pytest.raises(ValueError, match=r"library: expected one of transformers, got 'timm'"):
        integrations.register("timm")
    monkeypatch.setattr(integrations, "_version", lambda library: None)
    with pytest.raises(RuntimeError, match=r"library: expected transformers >= 5\.0, got not installed"):
        integrations.register()
    monkeypatch.setattr(integrations, "_version", lambda library: "4.57.6")
    with pytest.raises(RuntimeError, match=r"expected transformers >= 5\.0, got version 4\.57\.6"):
        integrations.register()
