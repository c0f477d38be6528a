"""The forward kernel of head dim 512 for sm_90a, run on the host, as test_attention_sm90.py does the others."""

from __future__ import annotations

import math
import re
import zlib

import pytest
import torch

from fastgen import backend
from fastgen.testing import assert_accurate
from tests.emulator import build
from tests.ops.attention_cases import Case, problem_of
from tests.ops.hopper_cases import CAUSAL, HOPPER, assert_equal_results, emulated_hopper, launches_of, shapes_of
from tests.ops.test_attention_kernels import PLAIN, assert_no_site_can_be_left_out, needs_module, plan

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

KERNEL = "attention_forward_wide_sm90"
CASES = [
    Case(torch.bfloat16, (512, 512), 65, 150, "none", heads=(2, 1)),
    Case(torch.float16, (464, 512), 20, 64, "causal", heads=(1, 1)),
    Case(torch.bfloat16, (512, 472), 130, 100, "window", heads=(1, 1)),
    Case(torch.float16, (512, 512), 64, 300, "causal window", heads=(1, 1)),
]


@pytest.fixture
def emulated(emulator, monkeypatch):
    return emulated_hopper(emulator, monkeypatch)


def launches(emulator):
    return launches_of(emulator, KERNEL)[0]


def operands(heads=1, queries=70, keys=150, dims=(512, 512), dtype=torch.bfloat16, key_heads=None):
    return [torch.randn(1, *shape).to(dtype) for shape in shapes_of(heads, queries, keys, dims, key_heads)]


def forward(operators, tensors, options=PLAIN, mask=None):
    return operators.attention_forward(*tensors, mask, None, None, *options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_that_of_the_formula(case, emulated, emulator):
    seed = zlib.crc32(str(case).encode())
    emulator.configure(seed=seed, **HOPPER)
    problem = problem_of(case, seed)
    before = launches(emulator)
    options = PLAIN._replace(window_left=problem.sides[0], window_right=problem.sides[1], scale=case.dims[0] ** -0.5)
    got = forward(emulated, problem.leaves, options)
    assert launches(emulator) == before + 1, "another kernel served it"
    plain, exact = (
        problem.formula([leaf.to(dtype) for leaf in problem.leaves]) for dtype in (case.dtype, torch.float64)
    )
    for name, ours, a, b in zip(("out", "lse"), got, plain, exact, strict=True):
        hidden = b == -math.inf
        assert torch.equal(ours == -math.inf, hidden), name
        assert_accurate(*(t.masked_fill(hidden, 0) for t in (ours, a, b)), name)


@pytest.mark.parametrize(("queries", "split"), [(60, True), (130, False)])
def test_parts_of_the_keys_are_added(emulated, emulator, queries, split):
    """Of one query tile, where the emulator has three multiprocessors; not of three."""
    tensors = operands(queries=queries, keys=600)
    before = launches(emulator), launches_of(emulator, "attention_combine")[0]
    got = forward(emulated, tensors, PLAIN._replace(scale=0.1))
    assert (launches(emulator), launches_of(emulator, "attention_combine")[0]) == (before[0] + 1, before[1] + split)
    exact = forward(torch.ops.fastgen_torch, [t.double() for t in tensors], PLAIN._replace(scale=0.1))
    torch.testing.assert_close(got[0].double(), exact[0], rtol=0, atol=0.03)
    torch.testing.assert_close(got[1].double(), exact[1].double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_keys_and_values_that_no_query_attends_to_may_be_anything(emulated, bad):
    """Behind the last query of a causal mask, and before the window of the first."""
    query, key, value = operands(keys=200)
    for options, hidden in [
        (CAUSAL, slice(70, None)),
        (PLAIN._replace(window_left=5, window_right=30), slice(100, None)),
    ]:
        results = []
        for filler in (0.0, bad):
            k, v = key.clone(), value.clone()
            k[:, :, hidden], v[:, :, hidden] = filler, filler
            results.append(forward(emulated, [query, k, v], options))
        assert_equal_results(results)


def test_a_row_without_keys_gives_zero(emulated):
    """Queries far behind the keys: whole tiles have none."""
    out, lse = forward(emulated, operands(queries=200, keys=30), PLAIN._replace(window_left=5, window_right=0))
    assert bool((out[:, :, 35:] == 0).all())
    assert bool((lse[:, :, 35:] == -math.inf).all())
    assert bool(lse[:, :, :35].isfinite().all())


def test_every_schedule_gives_the_same_bits(emulator, emulated):
    """Of more query tiles than there are blocks, with grouped heads."""
    tensors = operands(heads=4, key_heads=2, queries=130, keys=150)
    results = []
    for seed in range(3):
        emulator.configure(seed=seed, **HOPPER)
        results.append(forward(emulated, tensors, CAUSAL))
    assert_equal_results(results)


SYNCHRONIZING = (
    "sync_block|sync_named|arrive_named|mbarrier_init|mbarrier_wait|mbarrier_arrive|fence_mbarrier_init"
    "|fence_async_proxy|wgmma_fence|wgmma_commit|wgmma_wait"
)


def query_wait() -> str:
    """The site of the wait for the queries' buffer, as a pattern."""
    lines = (build.CSRC / "attention" / "sm90" / "wide.cuh").read_text().splitlines()
    (number,) = [number for number, line in enumerate(lines, 1) if "mbarrier_wait(&barriers.query_empty" in line]
    return rf"mbarrier_wait csrc/attention/sm90/wide\.cuh:{number} "


@pytest.mark.slow
def test_no_barrier_fence_or_wait_can_be_left_out(emulator, emulated):
    """A last key tile that is not full, and more query tiles than blocks."""
    tensors = operands(heads=3, queries=120, keys=210)
    call = lambda: forward(emulated, tensors)  # noqa: E731
    # With several key tiles, the values that wait for their buffer wait for the queries before too: see the next test.
    waits = f"(?!{query_wait()})(?:{SYNCHRONIZING})"
    assert_no_site_can_be_left_out(emulator, call, KERNEL, waits=waits, **HOPPER)
    emulator.configure(**HOPPER)
    call()
    assert {site.split()[0] for site in emulator.sites() if KERNEL in site} == {*SYNCHRONIZING.split("|")}


def test_queries_wait_for_their_buffer_where_each_tile_has_few_keys(emulator, emulated):
    tensors = operands(heads=3, queries=120, keys=60)
    emulator.configure(**HOPPER)
    forward(emulated, tensors)
    (site,) = [site for site in emulator.sites() if re.match(query_wait(), site)]
    for seed in range(3):
        emulator.configure(seed=seed, leave_out=site, **HOPPER)
        with pytest.raises(RuntimeError, match="emulator: "):
            forward(emulated, tensors)


OTHERS = {
    "padding": lambda: (operands(), PLAIN, torch.ones(1, 1, 1, 150, dtype=torch.bool)),
    "a softcap": lambda: (operands(), PLAIN._replace(softcap=0.7)),
    "narrower heads": lambda: (operands(dims=(512, 448)),),
    "few queries": lambda: (operands(queries=5),),
    "expanded keys": lambda: ([t[:, :1].expand(-1, 2, -1, -1) for t in operands()],),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_problems_take_the_other_kernels(emulator, emulated, what):
    tensors, *given = OTHERS[what]()
    before = launches(emulator)
    out, _ = forward(emulated, tensors, *given)
    assert launches(emulator) == before
    exact, _ = forward(torch.ops.fastgen_torch, [t.double() for t in tensors], *given)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=0.05)


@needs_module
def test_the_plan_says_what_it_serves():
    from benchmarks.shapes import ATTENTION_SHAPES

    name = "forward wide sm90"
    assert plan(ATTENTION_SHAPES["vae-mid"])[name] == {
        "tile": (512, 512), "warps": 12, "block_m": 64, "block_n": 64, "blocks": 64, "tiles_per_block": 1,
        "slices": 1, "splits": 2, "stages": 1, "shared_bytes": 3 * 64 * 1024 + 64 * 128 + 64 * 4,
    }  # fmt: skip
    for other in ({"shared_limit": backend.plans.SHARED_LIMITS["sm_80"]}, {"element_size": 4}, {"plain": False}):
        assert name not in plan(ATTENTION_SHAPES["vae-mid"], **other)
    assert {shape for shape in ATTENTION_SHAPES if name in plan(ATTENTION_SHAPES[shape])} == {"vae-mid"}
