"""The benchmark of the host's time before a launch, and that of the cost of a call: their cases run."""

from __future__ import annotations

import pytest
import torch

import fastgen
from benchmarks import host_path, overhead
from tests.emulator import build


@pytest.mark.slow
def test_calls_reach_the_launch():
    reason = build.why_not()
    if reason is not None:
        pytest.skip(reason)
    host_path.register()
    with fastgen.use_backend("host"):
        found = {case.name: case for case in host_path.cases()}
        for case in found.values():
            case.call()
        query = torch.empty(2, 4, 16, 64)
        out = fastgen.functional.scaled_dot_product_attention(query, query, query)
        # Nothing was computed, and the checks were made.
        assert out.shape == query.shape
        wide = (torch.empty(1, 1, 2, 600),) * 3
        options = (None, None, None, 0.0, -1, -1, 1.0, 0.0, False)
        with pytest.raises(RuntimeError, match="head dims up to"):
            fastgen.backend.call(host_path.NAMESPACE, "attention_forward", *wide, *options)
    assert found["attention: forward"].limit == 12.0


@pytest.mark.parametrize("case", overhead.attention_cases() + overhead.projection_cases(), ids=lambda case: case.name)
def test_cases_of_the_cost_of_a_call_run(case):
    for run in (case.ours, case.theirs):
        run()
