"""The kernel that computes all gradients of problems that fit one tile, in the emulator."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen.functional import scaled_dot_product_attention as attention
from tests.emulator import build
from tests.ops.attention_cases import Case, check

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

CASES = [Case(torch.bfloat16, (32, 32), 49, 49), Case(torch.bfloat16, (32, 32), 49, 49, "float"), Case(torch.float32, (32, 32), 17, 33, "causal")]

@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(emulator, case):
    build.register()
    before = emulator.statistics().get("attention_backward_one_tile", {"blocks": 0})["blocks"]
    with fastgen.use_backend("emulated"):
        check(case, torch.device("cpu"), 1)
    assert emulator.statistics()["attention_backward_one_tile"]["blocks"] > before
