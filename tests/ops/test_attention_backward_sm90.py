"""The backward kernels of attention for sm_90a, run on the host, as test_attention_sm90.py does the forward ones."""

from __future__ import annotations

import math
import zlib

import pytest
import torch

import fastgen
from fastgen import backend
from fastgen.testing import assert_accurate
from tests.emulator import build
from tests.ops.attention_cases import NAMES, cancellation, gradients, problem_of
from tests.ops.hopper_cases import (
    CAUSAL,
    HOPPER,
    assert_equal_results,
    assert_info_says,
    derivative_cases,
    emulated_hopper,
    forward_of,
    launches_of,
    shapes_of,
)
from tests.ops.test_attention_kernels import PLAIN, assert_no_site_can_be_left_out, needs_module, plan

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

QUERY, KEY_VALUE = "attention_backward_query_sm90", "attention_backward_key_value_sm90"
FEW, MANY = derivative_cases((17, 65, 130), (3, 64, 150)), derivative_cases((64, 203, 257, 400), (129, 257, 300))


@pytest.fixture
def emulated(emulator, monkeypatch):
    return emulated_hopper(emulator, monkeypatch)


def launches(emulator):
    return launches_of(emulator, QUERY, KEY_VALUE)


def operands(heads=2, queries=200, keys=300, dims=(64, 64), dtype=torch.bfloat16, batch=1, key_heads=None):
    """query, key, value and the gradient of out."""
    shapes = [*shapes_of(heads, queries, keys, dims, key_heads), (heads, queries, dims[1])]
    return [torch.randn(batch, *shape).to(dtype) for shape in shapes]


def backward(emulated, tensors, options=PLAIN, mask=None):
    """The gradients, from the out and logsumexp of PyTorch."""
    query, key, value, grad_out = tensors
    out, lse = forward_of(query, key, value, mask, options)
    arguments = (grad_out, torch.ones_like(lse), query, key, value, out, lse, mask, None, None, *options, False)
    return emulated.attention_backward(*arguments)[:3]


# --------------------------------------------------------------------------------------------------
# Results


def check(case, emulated, emulator):
    seed = zlib.crc32(str(case).encode())
    emulator.configure(seed=seed, **HOPPER)
    problem = problem_of(case, seed)
    before = launches(emulator)

    def formula(dtype):
        leaves = [leaf.to(dtype).requires_grad_() for leaf in problem.leaves]
        out, lse = problem.formula(leaves)
        return out.detach(), lse.detach(), gradients(out, lse, leaves, problem.upstream)

    out, lse, exact = formula(torch.float64)
    left, right = problem.sides
    options = PLAIN._replace(window_left=left, window_right=right, scale=case.dims[0] ** -0.5)
    grad_out, grad_lse = problem.upstream[0].to(case.dtype), problem.upstream[1].float()
    saved = (*problem.leaves, out.to(case.dtype), lse.float())
    got = emulated.attention_backward(grad_out, grad_lse, *saved, problem.mask, None, None, *options, False)
    assert launches(emulator) == [count + 1 for count in before], "other kernels served it"
    granted = cancellation(problem.leaves, problem.mask, None, left, right, problem.upstream[0])
    compared = zip(NAMES[2:], got, formula(case.dtype)[2], exact, granted, strict=False)
    for name, ours, plain, wanted, allowance in compared:
        assert_accurate(ours, plain, wanted, name, allowance)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_every_pair_of_settings(case, emulated, emulator):
    check(case, emulated, emulator)


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, ids=str)
def test_every_pair_of_settings_with_many_tiles(case, emulated, emulator):
    check(case, emulated, emulator)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(emulated, scale):
    tensors, options = operands(heads=1, queries=70, keys=80), PLAIN._replace(scale=scale)
    got = backward(emulated, tensors, options)
    exact = backward(torch.ops.fastgen_torch, [t.double() for t in tensors], options)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.02, atol=0.02)


def assert_same_bits(emulated, tensors, options, hide, mask=None):
    """With zeros and with ``bad`` in what hide(key, value, filler) overwrites."""
    results = []
    for filler in (0.0, math.nan, math.inf):
        query, key, value, grad_out = (t.clone() for t in tensors)
        hide(key, value, filler)
        results.append(backward(emulated, [query, key, value, grad_out], options, mask))
    assert_equal_results(results)
    return results[0]


@pytest.mark.parametrize("dims", [(64, 64), pytest.param((128, 128), marks=pytest.mark.slow)], ids=str)
def test_keys_and_values_that_no_query_attends_to_may_be_anything(emulated, dims):
    """Behind the last query of a causal mask, and before the window of the first."""
    tensors = operands(heads=1, queries=70, keys=200, dims=dims)
    for options, hidden in [
        (CAUSAL, slice(70, None)),
        (PLAIN._replace(window_left=10, window_right=30), slice(100, None)),
    ]:

        def hide(key, value, filler, hidden=hidden):
            key[:, :, hidden], value[:, :, hidden] = filler, filler

        _, grad_key, grad_value = assert_same_bits(emulated, tensors, options, hide)
        assert bool((grad_key[:, :, hidden] == 0).all())
        assert bool((grad_value[:, :, hidden] == 0).all())


@pytest.mark.parametrize("dims", [(64, 64), pytest.param((128, 128), marks=pytest.mark.slow)], ids=str)
def test_masked_keys_and_values_may_be_anything(emulated, dims):
    """Single keys, a whole tile of them, and the end of the last tile."""
    tensors = operands(queries=70, keys=330, dims=dims)
    mask = torch.rand(2, 1, 330) > 0.3
    mask[:, :, 128:256], mask[:, :, 320:] = False, False

    def hide(key, value, filler):
        for t in (key, value):
            t.masked_fill_(~mask.mT, filler)

    options = PLAIN._replace(window_right=250)
    _, grad_key, grad_value = assert_same_bits(emulated, tensors, options, hide, mask[None])
    assert bool((grad_key.masked_select(~mask.mT) == 0).all())
    assert bool((grad_value.masked_select(~mask.mT) == 0).all())


def test_a_batch_entry_without_unmasked_keys_has_no_gradient(emulated):
    one = operands(heads=1, queries=20, keys=140)
    mask = torch.ones(3, 1, 1, 140, dtype=torch.bool)
    mask[1] = False
    got = backward(emulated, [torch.cat([t, t, t]) for t in one], mask=mask)
    plain = backward(emulated, one)
    for a, b in zip(got, plain, strict=True):
        assert bool((a[1] == 0).all())
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[2], b[0])


def test_a_row_without_keys_has_no_gradient(emulated):
    """Queries far behind the keys: whole tiles have none."""
    tensors = operands(heads=1, queries=300, keys=40)
    grad_query, *others = backward(emulated, tensors, PLAIN._replace(window_left=5, window_right=0))
    assert bool((grad_query[:, :, 45:] == 0).all())
    assert all(bool(t.isfinite().all()) for t in (grad_query, *others))


def test_masks_of_the_heads_of_a_group_may_differ(emulated):
    """A head whose mask excludes all keys of a tile is skipped."""
    tensors = operands(heads=3, key_heads=1, queries=40, keys=200)
    mask = torch.rand(1, 3, 1, 200) > 0.3
    mask[:, 1, :, :128] = False
    mask[:, 2, :, 128:] = False
    got = backward(emulated, tensors, mask=mask)
    query, key, value, grad_out = (t.double() for t in tensors)
    many = [query, *(t.expand(-1, 3, -1, -1) for t in (key, value)), grad_out]
    exact = backward(torch.ops.fastgen_torch, many, mask=mask)
    exact = [exact[0], *(t.sum(1, keepdim=True) for t in exact[1:])]
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.02, atol=0.03)


def test_autograd_takes_them(emulator, emulated):
    tensors = operands(heads=1, queries=70, keys=90)[:3]
    before = launches(emulator)
    with fastgen.use_backend("emulated"):
        leaves = [t.requires_grad_() for t in tensors]
        out = fastgen.functional.scaled_dot_product_attention(*leaves, is_causal=True)
        got = torch.autograd.grad(out.float().square().sum(), leaves)
    assert launches(emulator) == [count + 1 for count in before]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact = fastgen.functional.scaled_dot_product_attention(*wide, is_causal=True)
    for a, b in zip(got, torch.autograd.grad(exact.square().sum(), wide), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.02, atol=0.05)


# --------------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize("dims", [(64, 64), pytest.param((128, 128), marks=pytest.mark.slow)], ids=str)
def test_every_schedule_gives_the_same_bits(emulator, emulated, dims):
    """Of more tiles than there are blocks, with grouped heads."""
    tensors = operands(heads=4, key_heads=2, queries=70, keys=200, dims=dims)
    results = []
    for seed in range(3):
        emulator.configure(seed=seed, **HOPPER)
        results.append(backward(emulated, tensors, CAUSAL))
    assert_equal_results(results)


SYNCHRONIZING = (
    "sync_block|sync_named|sync_warp|mbarrier_init|mbarrier_wait|mbarrier_arrive|fence_mbarrier_init"
    "|fence_async_proxy|wgmma_fence|wgmma_commit|wgmma_wait"
)
USED = {QUERY: set(SYNCHRONIZING.split("|")) - {"sync_warp"}}
USED[KEY_VALUE] = set(SYNCHRONIZING.split("|")) - {"sync_named", "fence_async_proxy"}
# More iterated tiles than stages, the last of them not full, and more owned tiles than blocks.
SIZES = {
    (QUERY, 64): (4, 100, 600), (QUERY, 128): (4, 100, 400),
    (KEY_VALUE, 64): (4, 600, 100), (KEY_VALUE, 128): (4, 300, 100),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize(("kernel", "dim"), SIZES, ids=str)
def test_no_barrier_fence_or_wait_can_be_left_out(emulator, emulated, kernel, dim, padded):
    heads, queries, keys = SIZES[kernel, dim]
    tensors = operands(heads, queries, keys, (dim, dim))
    mask = None
    if padded:
        mask = torch.ones(1, 1, 1, keys, dtype=torch.bool)
        mask[..., -3:] = False
    call = lambda: backward(emulated, tensors, mask=mask)  # noqa: E731
    assert_no_site_can_be_left_out(emulator, call, kernel, waits=SYNCHRONIZING, **HOPPER)
    emulator.configure(**HOPPER)
    call()
    sites = [site.split() for site in emulator.sites()]
    assert {site[0] for site in sites if any(word.startswith(kernel) for word in site)} == USED[kernel]


def test_tiles_outside_the_window_are_neither_copied_nor_computed(emulator, emulated):
    tensors = operands(heads=1, queries=384, keys=384)

    def work(options, mask=None):
        def counts():
            none = {"matrix_products": 0, "async_copies": 0}
            found = [emulator.statistics().get(kernel, none) for kernel in (QUERY, KEY_VALUE)]
            return [[kernel[what] for what in none] for kernel in found]

        before = counts()
        backward(emulated, tensors, options, mask)
        return [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(before, counts(), strict=True)]

    full, causal = work(PLAIN), work(CAUSAL)
    window = work(PLAIN._replace(window_left=100, window_right=0))
    for kernel in range(2):  # of three owned tiles, each with a copy of two operands
        assert [of[kernel][1] for of in (full, causal, window)] == [6 + 2 * 9, 6 + 2 * 6, 6 + 2 * 5]
        assert causal[kernel][0] == full[kernel][0] * 6 // 9
        assert window[kernel][0] == full[kernel][0] * 5 // 9
    mask = torch.ones(1, 1, 1, 384, dtype=torch.bool)
    mask[..., 128:256] = False
    padded = work(PLAIN, mask)
    assert padded[0] == [full[0][0] * 6 // 9, 6 + 2 * 6]
    assert padded[1] == [full[1][0] * 6 // 9, 4 + 2 * 6]


# --------------------------------------------------------------------------------------------------
# What they serve


def with_expanded_gradient():
    """The gradient of a sum over all but the last dim."""
    return [*operands(1, 40, 50)[:3], torch.ones(64, dtype=torch.bfloat16).expand(1, 1, 40, 64)]


OTHERS = {
    "float32": lambda: (operands(1, 40, 50, dtype=torch.float32), PLAIN, None),
    "a softcap": lambda: (operands(1, 40, 50), PLAIN._replace(softcap=0.7), None),
    "a mask of scores": lambda: (operands(1, 40, 50), PLAIN, torch.ones(1, 1, 40, 50, dtype=torch.bool)),
    "a float mask of keys": lambda: (operands(1, 40, 50), PLAIN, torch.zeros(1, 1, 1, 50)),
    "narrow heads": lambda: (operands(1, 40, 50, (32, 64)), PLAIN, None),
    "heads of different width": lambda: (operands(1, 40, 50, (64, 128)), PLAIN, None),
    "wide heads": lambda: (operands(1, 20, 30, (192, 192)), PLAIN, None),
    "an expanded gradient": lambda: (with_expanded_gradient(), PLAIN, None),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_other_problems_take_the_other_kernels(emulator, emulated, what):
    tensors, options, mask = OTHERS[what]()
    before = launches(emulator)
    got = backward(emulated, tensors, options, mask)
    assert launches(emulator) == before
    exact = backward(torch.ops.fastgen_torch, [t.double() for t in tensors], options, mask)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(("given", "limit"), [(None, "sm_90"), ("0", "sm_90"), ("1", "sm_80")])
def test_they_are_taken_on_sm_90_where_they_are_asked_for(emulator, emulated, monkeypatch, given, limit):
    monkeypatch.delenv("FASTGEN_SM90")
    if given is not None:
        monkeypatch.setenv("FASTGEN_SM90", given)
    emulator.configure(shared_limit=backend.plans.SHARED_LIMITS[limit])
    before = launches(emulator)
    backward(emulated, operands(1, 20, 20))
    assert launches(emulator) == before


@needs_module
def test_the_plan_says_what_they_serve():
    from benchmarks.shapes import ATTENTION_SHAPES

    long = plan(ATTENTION_SHAPES["long"])
    common = {"tile": (128, 128), "warps": 12, "blocks": 132, "tiles_per_block": 16, "slices": 1}
    assert long["query sm90"] == common | {
        "block_m": 128, "block_n": 128, "stages": 2, "shared_bytes": (2 * 128 + (3 + 2) * 128) * 256,
    }  # fmt: skip
    assert long["key_value sm90"] == common | {
        "block_m": 64, "block_n": 128, "stages": 4, "shared_bytes": (2 * 128 + 2 * 4 * 64) * 256 + 4 * 64 * 8,
    }  # fmt: skip
    for other in ({"shared_limit": backend.plans.SHARED_LIMITS["sm_80"]}, {"element_size": 4}, {"plain": False}):
        assert not {"query sm90", "key_value sm90"} & plan(ATTENTION_SHAPES["long"], **other).keys()
    served = {name for name, shape in ATTENTION_SHAPES.items() if "key_value sm90" in plan(shape)}
    assert {"transgan-window", "dit-xl", "image-lm", "long"} <= served
    assert not {"sagan-64", "sagan-256", "swin-window", "vae-mid"} & served


@pytest.mark.parametrize(("given", "text"), [("1", "the kernels for sm_90a"), ("", "FASTGEN_SM90=1 takes")])
def test_info_says_whether_they_are_taken(monkeypatch, given, text):
    assert_info_says(monkeypatch, "attention_backward", given, text)
