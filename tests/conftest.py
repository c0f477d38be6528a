"""Where a test runs: each backend on each device, or a skip that says why not."""

from __future__ import annotations

import os
import zlib

# Inductor's cache on disk does not notice that an operator's fake has changed since.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch

import fastgen
from fastgen import _library
from tests.emulator import build

PLACES = [("reference", "cpu"), ("compiled", "cpu"), ("emulated", "cpu"), ("reference", "cuda"), ("compiled", "cuda")]


def place_or_skip(backend: str, device: str, operator: str) -> torch.device:
    if backend == "emulated":
        reason = build.why_not()
        if reason is not None:
            pytest.skip(reason)
        build.register()
        return torch.device(device)
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    where = torch.device(device)
    if backend == "compiled":
        reason = _library.why_not_compiled(operator, where)
        if reason is not None:
            pytest.skip(reason)
    return where


@pytest.fixture(params=PLACES, ids=lambda place: "-".join(place))
def latent_place(request):
    """The device, with the backend forced around the test."""
    backend = request.param[0]
    device = place_or_skip(*request.param, "latent_forward")
    if backend == "emulated":
        request.getfixturevalue("emulator")
    with fastgen.use_backend(backend):
        yield device


@pytest.fixture
def emulator(request):
    """The emulator's module, with a schedule of this test's own; tensors made in the test are known to it."""
    reason = build.why_not()
    if reason is not None:
        pytest.skip(reason)
    module = build.module()
    given = os.environ.get("FASTGEN_EMULATOR_SEED")
    seed = int(given) if given else zlib.crc32(request.node.nodeid.encode())
    module.configure(seed=seed)
    print(f"FASTGEN_EMULATOR_SEED={seed}")  # shown where the test fails
    build.track_tensors(True)
    yield module
    build.track_tensors(False)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    return place_or_skip("reference", request.param, "")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
