"""Random calls of raw operators and public functions: quick ones here, many with sanitizers in the slow test."""

from __future__ import annotations

import sys

import pytest
import torch

from fastgen import backend, functional
from tests.fuzz import build, functions, operators
from tests.fuzz.__main__ import Failed, Fuzzer
from tests.fuzz.draw import Draw, guarded


def test_every_operator_and_function_is_called():
    names = {name for family in backend.operators().values() for name in family}
    assert set(operators.VALID) == names
    assert set(functions.VALID) == set(functional.__all__)


@pytest.mark.skipif(sys.platform != "linux", reason="guarded memory is mmap of Linux")
@pytest.mark.parametrize("first", [0, 500_000])
def test_random_calls_give_results_or_documented_errors(first):
    fuzzer = Fuzzer()
    for seed in range(first, first + 120):
        fuzzer.call(seed)


@pytest.mark.skipif(sys.platform != "linux", reason="guarded memory is mmap of Linux")
def test_guarded_memory_ends_where_the_tensor_does():
    tensor = guarded(7, torch.float16)
    assert (tensor.data_ptr() + 14) % 4096 == 0
    assert guarded(7, torch.float16, at_end=False).data_ptr() % 4096 == 0


def test_a_wrong_result_fails_with_its_seed(monkeypatch):
    forward = operators.latent_forward
    monkeypatch.setitem(operators.VALID, "latent_forward", lambda draw: forward(draw)._replace(shapes=[(1, 2, 3)]))
    monkeypatch.setattr(Fuzzer, "_spoil", lambda *arguments: False)
    fuzzer = Fuzzer(only="latent_forward")
    with pytest.raises(Failed, match="seed 3: "):
        fuzzer.call(3)


def test_a_call_is_a_function_of_its_seed():
    one, two = (operators.attention_backward(Draw(11)).arguments for _ in range(2))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one[2:5], two[2:5], strict=True))


@pytest.mark.slow
@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
def test_many_calls_under_sanitizers():
    done = build.run(["--calls", "3000", "--seed", "900000"], build.build())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
