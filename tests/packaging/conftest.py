"""A small wheel, for the tests of the release's tools."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.packaging import wheels
from tests.packaging.wheels import LIBRARY, Parts, build_info, compile_library


@pytest.fixture(scope="module")
def cpu_library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    if wheels.COMPILER is None:
        pytest.skip("no C compiler")
    return compile_library(tmp_path_factory.mktemp("library") / "_cpu.so", LIBRARY, info=build_info("cpu"))


@pytest.fixture
def parts(tmp_path: Path, cpu_library: bytes) -> Parts:
    """A wheel of CPU kernels that passes every gate."""
    return Parts(tmp_path, libraries={"fastgen/_cpu.so": cpu_library})
