"""The kernel of output and tangent for sm_90a, run on the host, as test_attention_sm90.py does the forward one."""

from __future__ import annotations

import math
import zlib

import pytest
import torch

import fastgen
from fastgen import backend, reference
from fastgen.testing import assert_accurate
from tests.emulator import build
from tests.ops.attention_cases import cancellation_second_order, problem_of
from tests.ops.hopper_cases import (
    CAUSAL,
    HOPPER,
    assert_equal_results,
    assert_info_says,
    derivative_cases,
    emulated_hopper,
    launches_of,
    operands,
    with_expanded_tangent,
    without_tangents,
)
from tests.ops.test_attention_kernels import PLAIN, assert_no_site_can_be_left_out, needs_module, plan

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

KERNEL = "attention_forward_tangent_sm90"
DIMS = [(64, 64), (64, 40), (48, 56)]
FEW, MANY = (
    derivative_cases((17, 65, 130), (3, 64, 150), DIMS),
    derivative_cases((64, 203, 257, 400), (97, 161, 300), DIMS),
)


@pytest.fixture
def emulated(emulator, monkeypatch):
    return emulated_hopper(emulator, monkeypatch)


def launches(emulator):
    return launches_of(emulator, KERNEL)[0]


def both(operators, tensors, options=PLAIN, mask=None, tangent_mask=None, seed=None):
    """out, lse and their tangents."""
    return operators.attention_forward_tangent(*tensors[:3], mask, seed, None, *tensors[3:], tangent_mask, *options)


def exact(tensors, *given):
    """In float64, with the tangents that there are."""
    return both(torch.ops.fastgen_torch, [t if t is None else t.double() for t in tensors], *given)


# --------------------------------------------------------------------------------------------------
# Results


def check(case, emulated, emulator):
    seed = zlib.crc32(str(case).encode())
    emulator.configure(seed=seed, **HOPPER)
    problem = problem_of(case, seed)
    leaves, sides = problem.leaves, problem.sides
    directions = [torch.randn(leaf.shape).to(torch.bfloat16).to(leaf) for leaf in leaves]
    scale = case.dims[0] ** -0.5

    def formula(dtype):
        cast = [t.to(dtype) for t in (*leaves, *directions)]
        tangents = reference.attention_tangent(*cast[:3], problem.mask, *cast[3:], None, None, *sides, scale)
        return *problem.formula(cast[:3]), *tangents

    options = PLAIN._replace(window_left=sides[0], window_right=sides[1], scale=scale)
    before = launches(emulator)
    got = both(emulated, [*leaves, *directions], options, problem.mask)
    assert launches(emulator) == before + 1, "another kernel served it"
    granted = cancellation_second_order(leaves, directions, problem.mask, None, *sides, problem.upstream[0])
    allowances = (0.0, 0.0, *granted[:2])
    compared = zip(got, formula(case.dtype), formula(torch.float64), allowances, strict=True)
    for name, (ours, plain, wanted, allowance) in zip(("out", "lse", "out'", "lse'"), compared, strict=True):
        hidden = wanted == -math.inf
        assert torch.equal(ours == -math.inf, hidden), name
        assert_accurate(*(t.masked_fill(hidden, 0) for t in (ours, plain, wanted)), name, allowance)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_every_pair_of_settings(case, emulated, emulator):
    check(case, emulated, emulator)


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, ids=str)
def test_every_pair_of_settings_with_many_tiles(case, emulated, emulator):
    check(case, emulated, emulator)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(emulated, scale):
    tensors, options = operands(heads=1, queries=70, keys=110), PLAIN._replace(scale=scale)
    for a, b in zip(both(emulated, tensors, options), exact(tensors, options), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0.02, atol=0.04)


def test_the_maximum_may_grow_with_each_tile(emulated):
    """Weights of the first tiles vanish, in the tangent too."""
    tensors = [t.float() for t in operands(heads=1, queries=70, keys=300)]
    tensors[1] = tensors[1] * torch.linspace(0.1, 4, 300)[:, None]
    tensors = [t.bfloat16() for t in tensors]
    for a, b in zip(both(emulated, tensors), exact(tensors), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0.03, atol=0.1)


def assert_same_bits(emulated, tensors, options, hide, mask=None):
    """With zeros and with others in what hide(tensors of keys, filler) overwrites."""
    results = []
    for filler in (0.0, math.nan, math.inf):
        copies = [t.clone() for t in tensors]
        for at in (1, 2, 4, 5):
            hide(copies[at], filler)
        results.append(both(emulated, copies, options, mask))
    assert_equal_results(results)


def test_keys_and_values_that_no_query_attends_to_may_be_anything(emulated):
    """Behind the last query of a causal mask, and before the window of the first."""
    tensors = operands(heads=1, queries=70, keys=200)
    for options, hidden in [
        (CAUSAL, slice(70, None)),
        (PLAIN._replace(window_left=10, window_right=30), slice(100, None)),
    ]:

        def hide(tensor, filler, hidden=hidden):
            tensor[:, :, hidden] = filler

        assert_same_bits(emulated, tensors, options, hide)


def test_masked_keys_and_values_may_be_anything(emulated):
    """Single keys, a whole tile of them, and the end of the last tile."""
    tensors = operands(queries=70, keys=330)
    mask = torch.rand(2, 1, 330) > 0.3
    mask[:, :, 128:192], mask[:, :, 320:] = False, False
    options = PLAIN._replace(window_right=250)
    assert_same_bits(emulated, tensors, options, lambda t, filler: t.masked_fill_(~mask.mT, filler), mask[None])


def test_a_batch_entry_without_unmasked_keys_gives_zero(emulated):
    one = operands(heads=1, queries=20, keys=140)
    mask = torch.ones(3, 1, 1, 140, dtype=torch.bool)
    mask[1] = False
    got = both(emulated, [torch.cat([t, t, t]) for t in one], PLAIN, mask)
    for at, (entries, plain) in enumerate(zip(got, exact(one), strict=True)):
        assert bool((entries[1] == (-math.inf if at == 1 else 0)).all())
        assert torch.equal(entries[0], entries[2])
        torch.testing.assert_close(entries[:1].double(), plain.double(), rtol=0.02, atol=0.06)


def test_a_row_without_keys_gives_zero(emulated):
    """Queries far behind the keys: whole tiles have none."""
    tensors = operands(heads=1, queries=300, keys=40)
    for at, found in enumerate(both(emulated, tensors, PLAIN._replace(window_left=5, window_right=0))):
        assert bool((found[:, :, 45:] == (-math.inf if at == 1 else 0)).all())
        assert bool(found[:, :, :45].isfinite().all())


def test_the_public_function_takes_it_and_has_gradients(emulator, emulated):
    tensors = [t.requires_grad_() for t in operands(heads=1, queries=70, keys=90)]
    before = launches(emulator)
    with fastgen.use_backend("emulated"):
        out, tangent = fastgen.functional.scaled_dot_product_attention_jvp(tensors[:3], tensors[3:], is_causal=True)
        assert launches(emulator) == before + 1
        got = torch.autograd.grad((out.float() * tangent.float()).sum(), tensors)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    out, tangent = fastgen.functional.scaled_dot_product_attention_jvp(wide[:3], wide[3:], is_causal=True)
    for a, b in zip(got, torch.autograd.grad((out * tangent).sum(), wide), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.05, atol=0.05 * float(b.abs().max()))


# --------------------------------------------------------------------------------------------------
# Schedules


def test_every_schedule_gives_the_same_bits(emulator, emulated):
    """Of more query tiles than there are blocks, with grouped heads."""
    tensors = operands(heads=4, key_heads=2, queries=150, keys=200)
    results = []
    for seed in range(3):
        emulator.configure(seed=seed, **HOPPER)
        results.append(both(emulated, tensors, CAUSAL))
    assert_equal_results(results)


SYNCHRONIZING = (
    "sync_block|sync_named|mbarrier_init|mbarrier_wait|mbarrier_arrive|fence_mbarrier_init|fence_async_proxy"
    "|wgmma_fence|wgmma_commit|wgmma_wait"
)


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_no_barrier_fence_or_wait_can_be_left_out(emulator, emulated, padded):
    """More key tiles than stages, a last one that is not full, and more query tiles than blocks."""
    mask = torch.ones(1, 1, 1, 450, dtype=torch.bool) if padded else None
    if mask is not None:
        mask[..., -3:] = False
    tensors = operands(heads=4, queries=100, keys=450)
    call = lambda: both(emulated, tensors, PLAIN, mask)  # noqa: E731
    assert_no_site_can_be_left_out(emulator, call, KERNEL, waits=SYNCHRONIZING, **HOPPER)
    emulator.configure(**HOPPER)
    call()
    sites = [site.split() for site in emulator.sites()]
    assert {site[0] for site in sites if KERNEL in site} == {*SYNCHRONIZING.split("|")}


def test_tiles_outside_the_window_are_neither_copied_nor_computed(emulator, emulated):
    """Three tiles of 128 queries, and four of 96 keys."""
    tensors = operands(heads=1, queries=384, keys=384)

    def work(options):
        before = emulator.statistics().get(KERNEL, {"matrix_products": 0, "async_copies": 0})
        both(emulated, tensors, options)
        return [emulator.statistics()[KERNEL][what] - before[what] for what in ("matrix_products", "async_copies")]

    full, causal = work(PLAIN), work(CAUSAL)
    assert causal[0] == full[0] * 9 // 12  # 2, 3 and 4 key tiles
    assert (full[1], causal[1]) == (2 * 3 + 4 * 12, 2 * 3 + 4 * 9)


# --------------------------------------------------------------------------------------------------
# What it serves


DROPPED = PLAIN._replace(dropout_p=0.4)
OTHERS = {
    "float32": lambda: (operands(1, 40, 50, dtype=torch.float32),),
    "dropout": lambda: (operands(1, 40, 50), DROPPED, None, None, torch.tensor([5])),
    "a softcap": lambda: (operands(1, 40, 50), PLAIN._replace(softcap=0.7)),
    "a mask of scores": lambda: (operands(1, 40, 50), PLAIN, torch.ones(1, 1, 40, 50, dtype=torch.bool)),
    "a float mask of keys": lambda: (operands(1, 40, 50), PLAIN, torch.zeros(1, 1, 1, 50)),
    "a tangent of the mask": lambda: (
        operands(1, 40, 50),
        PLAIN,
        torch.zeros(1, 1, 1, 50),
        torch.ones(1, 1, 1, 50),
    ),
    "no tangent of the query": lambda: (without_tangents(0),),
    "no tangent of key and value": lambda: (without_tangents(1, 2),),
    "no tangent": lambda: (without_tangents(0, 1, 2),),
    "an expanded tangent": lambda: (with_expanded_tangent(),),
    "few queries against many keys": lambda: (operands(1, 1, 200, dtype=torch.float32),),
    "narrow heads": lambda: (operands(1, 40, 50, (32, 64)),),
    "rows that are not aligned": lambda: (operands(1, 20, 30, (20, 13)),),
    "wide heads": lambda: (operands(1, 40, 50, (128, 128)),),
    "the widest heads": lambda: (operands(1, 20, 30, (264, 264)),),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_problems_take_two_kernels(emulator, emulated, what):
    tensors, *given = OTHERS[what]()
    before = launches(emulator)
    got = both(emulated, tensors, *given)
    assert launches(emulator) == before
    for a, b in zip(got, exact(tensors, *given), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0.05, atol=0.1)


@pytest.mark.parametrize(("given", "limit"), [(None, "sm_90"), ("0", "sm_90"), ("1", "sm_80")])
def test_it_is_taken_on_sm_90_where_it_is_asked_for(emulator, emulated, monkeypatch, given, limit):
    monkeypatch.delenv("FASTGEN_SM90")
    if given is not None:
        monkeypatch.setenv("FASTGEN_SM90", given)
    emulator.configure(shared_limit=backend.plans.SHARED_LIMITS[limit])
    before = launches(emulator)
    both(emulated, operands(1, 20, 20))
    assert launches(emulator) == before


@needs_module
def test_the_plan_says_what_it_serves():
    from benchmarks.shapes import ATTENTION_SHAPES

    name = "forward tangent sm90"
    assert plan(ATTENTION_SHAPES["image-lm"])[name] == {
        "tile": (64, 64), "warps": 12, "block_m": 128, "block_n": 96, "slices": 1, "blocks": 132,
        "tiles_per_block": 8, "stages": 3, "shared_bytes": (2 * 128 + 3 * 4 * 96) * 128,
    }  # fmt: skip
    for other in ({"shared_limit": backend.plans.SHARED_LIMITS["sm_80"]}, {"element_size": 4}, {"plain": False}):
        assert name not in plan(ATTENTION_SHAPES["image-lm"], **other)
    served = {shape for shape in ATTENTION_SHAPES if name in plan(ATTENTION_SHAPES[shape])}
    assert {"transgan-window", "image-lm", "char-lm"} <= served
    assert not {"sagan-64", "sagan-256", "swin-window", "vae-mid", "long", "dit-xl"} & served


@pytest.mark.parametrize(
    ("given", "text"), [("1", "40 to 64, by the kernels for sm_90a"), ("", "FASTGEN_SM90=1 takes")]
)
def test_info_says_whether_it_is_taken(monkeypatch, given, text):
    assert_info_says(monkeypatch, "attention_forward_tangent", given, text)
