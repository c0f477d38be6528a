"""The instruction set levels of the CPU kernels: PyTorch's results at each, and the choice of one."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgen
from fastgen import backend
from fastgen.functional import scaled_dot_product_attention
from tests.fuzz.draw import Draw
from tests.fuzz.operators import VALID

KERNELS = sorted(name for name in VALID if name.startswith(("cpu_", "latent_")))
CALLS = 40
needs_levels = pytest.mark.skipif(len(backend.cpu_levels()) < 2, reason="kernels of one level only")

# Of the largest magnitude of a tensor, or of 1.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def outcome(namespace: Any, name: str, arguments: list[Any]) -> list[Tensor]:
    """The results of an operator, and its arguments, some of which are written to."""
    arguments = copy.deepcopy(arguments)
    results = getattr(namespace, name)(*arguments)
    results = [results] if isinstance(results, Tensor) else list(results or ())
    return results + [argument for argument in arguments if isinstance(argument, Tensor)]


@pytest.mark.skipif(not backend.cpu_levels(), reason="the CPU library is not compiled")
@pytest.mark.parametrize("name", KERNELS)
def test_each_level_gives_the_results_of_pytorch(name: str) -> None:
    compared = 0
    for seed in range(CALLS):
        draw = Draw(seed, guard=False)
        arguments = VALID[name](draw).arguments
        if not draw.plain or any(isinstance(given, Tensor) and given.dtype == torch.float64 for given in arguments):
            continue  # special values have tests of their own; PyTorch serves float64
        expected = outcome(torch.ops.fastgen_torch, name, arguments)
        for level in backend.cpu_levels():
            with backend.use_cpu_level(level):
                found = outcome(torch.ops.fastgen, name, arguments)
            for got, wanted in zip(found, expected, strict=True):
                if name == "cpu_dropout_keep" or not wanted.is_floating_point():
                    assert torch.equal(got, wanted), (level, seed)
                elif wanted.numel():
                    scale = torch.nan_to_num(wanted, posinf=1.0, neginf=1.0).abs().max().clamp(min=1.0).item()
                    tolerance = TOLERANCES[wanted.dtype]
                    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
                    compared += wanted.numel()
    assert compared > 100 or name == "cpu_dropout_keep"


@needs_levels
def test_a_level_in_use_is_that_of_the_kernels_and_ends_with_its_block() -> None:
    """Fused products round differently: the results of SSE2 and AVX2 differ in their last bits."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 1, 64, 8), torch.randn(2, 1, 64, 8), torch.randn(2, 1, 64, 32)
    before = backend.cpu_level()
    results: dict[str, Any] = {}
    for level in backend.cpu_levels():
        with backend.use_cpu_level(level):
            assert backend.cpu_level() == level
            results[level] = scaled_dot_product_attention(query, key, value)
    assert backend.cpu_level() == before
    assert not torch.equal(results["generic"], results["avx2"])
    after: Any = scaled_dot_product_attention(query, key, value)
    assert torch.equal(results[str(before)], after)


@needs_levels
def test_the_environment_chooses_the_level_and_info_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with backend.use_cpu_level("avx2"):  # to be undone at the end
        monkeypatch.setenv("FASTGEN_CPU", "generic")
        backend.choose_cpu_level()
        assert ", kernels for generic (FASTGEN_CPU=avx2" in str(fastgen.info())
        monkeypatch.setenv("FASTGEN_CPU", "")
        backend.choose_cpu_level()
        assert backend.cpu_level() == "generic"


def test_the_environment_is_read_at_import_and_an_unknown_level_is_refused() -> None:
    environment = {**os.environ, "FASTGEN_CPU": "sse9"}
    done = subprocess.run(
        [sys.executable, "-c", "import fastgen"], env=environment, capture_output=True, text=True, check=False
    )
    assert "ValueError: FASTGEN_CPU: expected one of generic, avx2, avx512, got 'sse9'" in done.stderr


def test_a_level_that_this_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = SimpleNamespace(fastgen_best_cpu_level=lambda: b"avx2", fastgen_use_cpu_level=lambda name: 0)
    monkeypatch.setattr(backend.library_for("cpu"), "handle", handle)
    monkeypatch.setenv("FASTGEN_CPU", "avx512")
    with pytest.raises(ValueError, match=r"FASTGEN_CPU: expected a level of this CPU \(generic, avx2\), got 'avx512'"):
        backend.choose_cpu_level()


def test_without_the_compiled_library_there_is_no_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.library_for("cpu"), "handle", None)
    monkeypatch.setenv("FASTGEN_CPU", "avx2")
    backend.choose_cpu_level()
    assert backend.cpu_level() is None
    assert backend.cpu_levels() == ()
    assert "kernels for" not in str(fastgen.info())
