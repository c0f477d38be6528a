"""Fixtures: each backend on each device that there is, or a skip with the reason."""

from __future__ import annotations

import os
import re
import zlib
from collections import Counter

# A worker of pytest-xdist has one core, and so do the processes that its tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor's cache on disk does not notice that an operator's fake has changed since.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch

import fastgen
from fastgen.backend import plans, why_not_compiled
from fastgen.ops.attention import direct
from tests.emulator import build

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
BACKENDS = {"cpu": ("torch", "compiled", "emulated"), "cuda": ("torch", "compiled")}
PLACES = [(backend, device) for device in DEVICES for backend in BACKENDS[device]]


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
        reason = why_not_compiled(operator, where)
        if reason is not None:
            pytest.skip(reason)
    return where


def _forced(request, operator: str):
    """The device of a place; its backend is forced during the test."""
    backend = request.param[0]
    device = place_or_skip(*request.param, operator)
    if backend == "emulated":
        request.getfixturevalue("emulator")
    with fastgen.use_backend(backend):
        yield device


@pytest.fixture
def second_order_operators(monkeypatch):
    """Second derivatives, jvps and learned biases of few scores take the operators, as those of many do."""
    monkeypatch.setattr(direct, "_is_small", lambda shape, of_keys: False)


@pytest.fixture(params=PLACES, ids=lambda place: "-".join(place))
def latent_place(request):
    yield from _forced(request, "latent_forward")


@pytest.fixture(params=[place for place in PLACES if place != ("compiled", "cpu")], ids=lambda place: "-".join(place))
def attention_place(request):
    """Without ("compiled", "cpu"): on CPU only parts of attention are compiled, which the PyTorch path calls."""
    yield from _forced(request, "attention_forward")


@pytest.fixture
def fresh_compiler():
    """torch.compile without the code of earlier tests: it gives up on a function with too many recompilations."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def emulator(request):
    """The emulator's module, with a schedule and an architecture's shared memory seeded by the test.

    It tracks tensors that the test allocates.
    """
    reason = build.why_not()
    if reason is not None:
        pytest.skip(reason)
    module = build.module()
    given = os.environ.get("FASTGEN_EMULATOR_SEED")
    seed = int(given) if given else zlib.crc32(request.node.nodeid.encode())
    limits = sorted(set(plans.SHARED_LIMITS.values()))
    module.configure(seed=seed, shared_limit=limits[seed % len(limits)])
    print(f"FASTGEN_EMULATOR_SEED={seed}")  # shown where the test fails
    build.track_tensors(True)
    yield module
    build.track_tensors(False)


@pytest.fixture(params=DEVICES)
def device(request):
    return place_or_skip("torch", request.param, "")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    """Makes ids equal in every process: pytest-xdist's workers compare them, and they seed the emulator's schedules.

    ``ids=str`` would show where in memory a function lies.
    """
    for mark in metafunc.definition.iter_markers("parametrize"):
        if mark.kwargs.get("ids") is str:
            mark.kwargs["ids"] = lambda value: re.sub(r" at 0x[0-9a-f]+", "", str(value))


def modes() -> dict[str, object]:
    """Global modes that a test must restore: later tests would run without autograd, or inside a transform."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "excluded dispatch keys": str(torch._C._dispatch_tls_local_exclude_set()),
        "included dispatch keys": str(torch._C._dispatch_tls_local_include_set()),
        "a torch.func transform": torch._C._functorch.peek_interpreter_stack() is not None,
        "a dual level": torch.autograd.forward_ad._current_level,
    }


def seed() -> None:
    """torch.manual_seed(0). Without a GPU, that stores the stack for each kind of device, which takes a millisecond."""
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _seeded():
    seed()
    before = modes()
    yield
    left = {name: value for name, value in modes().items() if value != before[name]}
    torch.set_grad_enabled(True)
    assert not left, f"the test left a mode behind: {left}"


def work_here() -> dict[str, dict[str, int]]:
    """Counters of the library's kernels in this process's emulator."""
    if build.module.cache_info().currsize == 0:
        return {}
    samples = {*build.module().kernels()}
    return {
        kernel: counters
        for kernel, counters in build.module().statistics().items()
        if kernel not in samples and not kernel.endswith(")")  # nor a planted mistake
    }


_work_of_workers: dict[str, Counter[str]] = {}


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["emulated"] = work_here()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Adds the counters of a finished pytest-xdist worker. One that crashed has no output."""
    for kernel, counters in getattr(node, "workeroutput", {}).get("emulated", {}).items():
        _work_of_workers.setdefault(kernel, Counter()).update(counters)


def pytest_terminal_summary(terminalreporter):
    """Counters of the library's kernels in the emulator, over the whole run."""
    columns = ("launches", "blocks", "block_barriers", "shuffles", "matrix_products", "shared_passes", "bank_conflicts")
    rows = [
        [kernel, *(str(counters[column]) for column in columns)]
        for kernel, counters in sorted((_work_of_workers or work_here()).items())
    ]
    if rows:
        terminalreporter.section("kernels in the emulator")
        for row in [["", *(column.replace("_", " ") for column in columns)], *rows]:
            terminalreporter.write_line("  ".join([row[0].ljust(20), *(cell.rjust(15) for cell in row[1:])]))
