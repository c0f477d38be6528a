"""Where a test runs: each backend on each device, or a skip that says why not."""

from __future__ import annotations

import os

# Inductor's cache on disk does not notice that an operator's fake has changed since.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch

import fastgen
from fastgen import _library

PLACES = [("reference", "cpu"), ("compiled", "cpu"), ("reference", "cuda"), ("compiled", "cuda")]


def place_or_skip(backend: str, device: str, operator: str) -> torch.device:
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
    device = place_or_skip(*request.param, "latent_forward")
    with fastgen.use_backend(request.param[0]):
        yield device


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    return place_or_skip("reference", request.param, "")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
