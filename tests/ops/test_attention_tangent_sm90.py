"""The tangent kernel of attention for sm_90a, run on the host, as test_attention_sm90.py does the forward one."""

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
    forward_of,
    launches_of,
    operands,
    with_expanded_tangent,
    without_tangents,
)
from tests.ops.test_attention_kernels import PLAIN, assert_no_site_can_be_left_out, needs_module, plan

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

KERNEL = "attention_tangent_sm90"
FEW, MANY = derivative_cases((17, 65, 130), (3, 64, 150)), derivative_cases((64, 203, 257, 400), (97, 161, 300))


@pytest.fixture
def emulated(emulator, monkeypatch):
    return emulated_hopper(emulator, monkeypatch)


def launches(emulator):
    return launches_of(emulator, KERNEL)[0]


def arguments(tensors, options=PLAIN, mask=None, tangent_mask=None):
    """Those of attention_tangent, with the out and logsumexp of PyTorch."""
    query, key, value, *tangents = tensors
    out, lse = forward_of(query, key, value, mask, options)
    return (query, key, value, out, lse, mask, None, None, *tangents, tangent_mask, *options)


def tangent(operators, tensors, *given):
    return operators.attention_tangent(*arguments(tensors, *given))


def exact(tensors, *given):
    """In float64, with the tangents that there are."""
    return tangent(torch.ops.fastgen_torch, [t if t is None else t.double() for t in tensors], *given)


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
        return reference.attention_tangent(*cast[:3], problem.mask, *cast[3:], None, None, *sides, scale)

    out, lse = problem.formula([leaf.double() for leaf in leaves])
    options = PLAIN._replace(window_left=sides[0], window_right=sides[1], scale=scale)
    saved = (*leaves, out.to(case.dtype), lse.float(), problem.mask, None, None)
    before = launches(emulator)
    got = emulated.attention_tangent(*saved, *directions, None, *options)
    assert launches(emulator) == before + 1, "another kernel served it"
    granted = cancellation_second_order(leaves, directions, problem.mask, None, *sides, problem.upstream[0])
    compared = zip(("out", "lse"), got, formula(case.dtype), formula(torch.float64), granted, strict=False)
    for name, ours, plain, wanted, allowance in compared:
        assert_accurate(ours, plain, wanted, f"tangent of {name}", allowance)


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
    for a, b in zip(tangent(emulated, tensors, options), exact(tensors, options), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0.02, atol=0.04)


def assert_same_bits(emulated, tensors, options, hide, mask=None):
    """With zeros and with others in what hide(tensors of keys, filler) overwrites."""
    results = []
    for filler in (0.0, math.nan, math.inf):
        query, key, value, of_query, of_key, of_value = (t.clone() for t in tensors)
        for one in (key, value, of_key, of_value):
            hide(one, filler)
        results.append(tangent(emulated, [query, key, value, of_query, of_key, of_value], options, mask))
    assert_equal_results(results)


@pytest.mark.parametrize("dims", [(64, 64), pytest.param((128, 128), marks=pytest.mark.slow)], ids=str)
def test_keys_and_values_that_no_query_attends_to_may_be_anything(emulated, dims):
    """Behind the last query of a causal mask, and before the window of the first."""
    tensors = operands(heads=1, queries=70, keys=200, dims=dims)
    for options, hidden in [
        (CAUSAL, slice(70, None)),
        (PLAIN._replace(window_left=10, window_right=30), slice(100, None)),
    ]:

        def hide(tensor, filler, hidden=hidden):
            tensor[:, :, hidden] = filler

        assert_same_bits(emulated, tensors, options, hide)


@pytest.mark.parametrize("dims", [(64, 64), pytest.param((128, 128), marks=pytest.mark.slow)], ids=str)
def test_masked_keys_and_values_may_be_anything(emulated, dims):
    """Single keys, a whole tile of them, and the end of the last tile."""
    tensors = operands(queries=70, keys=330, dims=dims)
    mask = torch.rand(2, 1, 330) > 0.3
    mask[:, :, 128:192], mask[:, :, 320:] = False, False
    options = PLAIN._replace(window_right=250)
    assert_same_bits(emulated, tensors, options, lambda t, filler: t.masked_fill_(~mask.mT, filler), mask[None])


def test_a_batch_entry_without_unmasked_keys_has_no_tangent(emulated):
    one = operands(heads=1, queries=20, keys=140)
    mask = torch.ones(3, 1, 1, 140, dtype=torch.bool)
    mask[1] = False
    got = tangent(emulated, [torch.cat([t, t, t]) for t in one], PLAIN, mask)
    for entries, plain in zip(got, exact(one), strict=True):
        assert bool((entries[1] == 0).all())
        assert torch.equal(entries[0], entries[2])
        torch.testing.assert_close(entries[:1].double(), plain.double(), rtol=0.02, atol=0.06)


def test_a_row_without_keys_has_no_tangent(emulated):
    """Queries far behind the keys: whole tiles have none."""
    tensors = operands(heads=1, queries=300, keys=40)
    for found in tangent(emulated, tensors, PLAIN._replace(window_left=5, window_right=0)):
        assert bool((found[:, :, 45:] == 0).all())
        assert bool(found.isfinite().all())


def test_forward_mode_and_second_order_take_it(emulator, emulated):
    tensors, tangents = (lambda t: (t[:3], t[3:]))([t.float().to(t) for t in operands(heads=1, queries=70, keys=90)])

    def attend(*leaves):
        return fastgen.functional.scaled_dot_product_attention(*leaves, is_causal=True)

    def penalty(*leaves):
        grads = torch.autograd.grad(attend(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.double().square().sum() for grad in grads), leaves)

    before = launches(emulator)
    with fastgen.use_backend("emulated"):
        out, found = torch.func.jvp(attend, tuple(tensors), tuple(tangents))
        assert launches(emulator) == before + 1
        penalty(*(t.requires_grad_() for t in tensors))
        assert launches(emulator) == before + 2
    wide = [t.detach().double() for t in (*tensors, *tangents)]
    wanted = torch.func.jvp(attend, tuple(wide[:3]), tuple(wide[3:]))
    for a, b in zip((out, found), wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.02, atol=0.05)


# --------------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize("dims", [(64, 64), pytest.param((128, 128), marks=pytest.mark.slow)], ids=str)
def test_every_schedule_gives_the_same_bits(emulator, emulated, dims):
    """Of more query tiles than there are blocks, with grouped heads."""
    tensors = operands(heads=4, key_heads=2, queries=150, keys=200, dims=dims)
    given = arguments(tensors, CAUSAL)
    results = []
    for seed in range(3):
        emulator.configure(seed=seed, **HOPPER)
        results.append(emulated.attention_tangent(*given))
    assert_equal_results(results)


SYNCHRONIZING = (
    "sync_block|sync_named|mbarrier_init|mbarrier_wait|mbarrier_arrive|fence_mbarrier_init|fence_async_proxy"
    "|wgmma_fence|wgmma_commit|wgmma_wait"
)


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize(("dim", "keys"), [(64, 450), (128, 300)])
def test_no_barrier_fence_or_wait_can_be_left_out(emulator, emulated, dim, keys, padded):
    """More key tiles than stages, a last one that is not full, and more query tiles than blocks."""
    mask = torch.ones(1, 1, 1, keys, dtype=torch.bool) if padded else None
    if mask is not None:
        mask[..., -3:] = False
    given = arguments(operands(heads=4, queries=100, keys=keys, dims=(dim, dim)), PLAIN, mask)
    call = lambda: emulated.attention_tangent(*given)  # noqa: E731
    assert_no_site_can_be_left_out(emulator, call, KERNEL, waits=SYNCHRONIZING, **HOPPER)
    emulator.configure(**HOPPER)
    call()
    sites = [site.split() for site in emulator.sites()]
    assert {site[0] for site in sites if KERNEL in site} == {*SYNCHRONIZING.split("|")}


def test_tiles_outside_the_window_are_neither_copied_nor_computed(emulator, emulated):
    """Three tiles of 128 queries, and four of 96 keys; with padding six of 64."""
    tensors = operands(heads=1, queries=384, keys=384)

    def work(options, mask=None):
        given = arguments(tensors, options, mask)
        before = emulator.statistics().get(KERNEL, {"matrix_products": 0, "async_copies": 0})
        emulated.attention_tangent(*given)
        return [emulator.statistics()[KERNEL][what] - before[what] for what in ("matrix_products", "async_copies")]

    full, causal = work(PLAIN), work(CAUSAL)
    window = work(PLAIN._replace(window_left=90, window_right=0))
    assert causal[0] == full[0] * 9 // 12  # 2, 3 and 4 key tiles
    assert window[0] == full[0] * 8 // 12  # 2, 3 and 3
    assert (full[1], causal[1], window[1]) == (2 * 3 + 4 * 12, 2 * 3 + 4 * 9, 2 * 3 + 4 * 8)
    mask = torch.ones(1, 1, 1, 384, dtype=torch.bool)
    mask[..., -1] = False
    every = work(PLAIN, mask)
    mask[..., 128:256] = False
    assert work(PLAIN, mask) == [every[0] * 4 // 6, 2 * 3 + 4 * 12]
    assert every[1] == 2 * 3 + 4 * 18


# --------------------------------------------------------------------------------------------------
# What it serves


OTHERS = {
    "float32": lambda: (operands(1, 40, 50, dtype=torch.float32), PLAIN, None, None),
    "a softcap": lambda: (operands(1, 40, 50), PLAIN._replace(softcap=0.7), None, None),
    "a mask of scores": lambda: (operands(1, 40, 50), PLAIN, torch.ones(1, 1, 40, 50, dtype=torch.bool), None),
    "a float mask of keys": lambda: (operands(1, 40, 50), PLAIN, torch.zeros(1, 1, 1, 50), None),
    "a tangent of the mask": lambda: (operands(1, 40, 50), PLAIN, torch.zeros(1, 1, 1, 50), torch.ones(1, 1, 1, 50)),
    "no tangent of the query": lambda: (without_tangents(0), PLAIN, None, None),
    "no tangent of the key": lambda: (without_tangents(1), PLAIN, None, None),
    "no tangent of the value": lambda: (without_tangents(2), PLAIN, None, None),
    "an expanded tangent": lambda: (with_expanded_tangent(), PLAIN, None, None),
    "narrow heads": lambda: (operands(1, 40, 50, (32, 64)), PLAIN, None, None),
    "heads of different width": lambda: (operands(1, 40, 50, (64, 128)), PLAIN, None, None),
    "wide heads": lambda: (operands(1, 20, 30, (192, 192)), PLAIN, None, None),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_other_problems_take_the_other_kernels(emulator, emulated, what):
    tensors, *given = OTHERS[what]()
    before = launches(emulator)
    got = tangent(emulated, tensors, *given)
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
    tangent(emulated, operands(1, 20, 20))
    assert launches(emulator) == before


@needs_module
def test_the_plan_says_what_it_serves():
    from benchmarks.shapes import ATTENTION_SHAPES

    common = {"warps": 12, "block_m": 128, "slices": 1}
    assert plan(ATTENTION_SHAPES["long"])["tangent sm90"] == common | {
        "tile": (128, 128), "block_n": 80, "blocks": 132, "tiles_per_block": 16, "stages": 2,
        "shared_bytes": (2 * 128 + 2 * 4 * 80) * 256,
    }  # fmt: skip
    narrow = plan(ATTENTION_SHAPES["image-lm"])["tangent sm90"]
    assert (narrow["block_n"], narrow["stages"], narrow["shared_bytes"]) == (96, 3, (2 * 128 + 3 * 4 * 96) * 128)
    for other in ({"shared_limit": backend.plans.SHARED_LIMITS["sm_80"]}, {"element_size": 4}, {"plain": False}):
        assert "tangent sm90" not in plan(ATTENTION_SHAPES["long"], **other)
    served = {name for name, shape in ATTENTION_SHAPES.items() if "tangent sm90" in plan(shape)}
    assert {"transgan-window", "dit-xl", "image-lm", "long"} <= served
    assert not {"sagan-64", "sagan-256", "swin-window", "vae-mid"} & served


@pytest.mark.parametrize(("given", "text"), [("1", "the kernels for sm_90a"), ("", "FASTGEN_SM90=1 takes")])
def test_info_says_whether_it_is_taken(monkeypatch, given, text):
    assert_info_says(monkeypatch, "attention_tangent", given, text)
