"""The kernels for few queries against many keys: split keys, and the heads of a group in the rows of one fragment.

The emulator's GPU has three multiprocessors, so that six blocks or more are not split.
"""

from __future__ import annotations

import math
import zlib

import pytest
import torch

import fastgen
from benchmarks.shapes import ATTENTION_SHAPES
from fastgen import backend
from fastgen.functional import scaled_dot_product_attention as attention
from fastgen.nn import KVCache
from fastgen.testing import assert_accurate
from tests.covering import covering
from tests.emulator import build
from tests.ops.attention_cases import DTYPES, LAYOUTS, MASKS, SOFTCAPS, Case, check, problem_of
from tests.ops.test_attention_kernels import PLAIN, assert_no_site_can_be_left_out, needs_module

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

DIMS = [(64, 64), (128, 128), (192, 192), (256, 256), (32, 16), (40, 72), (5, 3), (20, 136)]
HEADS = [(1, 1), (2, 2), (4, 2), (8, 1), (3, 1), (20, 2), (8, 8)]


@pytest.fixture
def emulated(emulator):
    build.register()
    with fastgen.use_backend("emulated"):
        yield torch.ops.fastgen_emulated


def launches(emulator, kernel="attention_decode"):
    return emulator.statistics().get(kernel, {"launches": 0})["launches"]


def operands(heads=(2, 2), queries=1, keys=300, dims=(64, 64), dtype=torch.bfloat16, batch=1):
    shapes = ((heads[0], queries, dims[0]), (heads[1], keys, dims[0]), (heads[1], keys, dims[1]))
    return [torch.randn(batch, *shape).to(dtype) for shape in shapes]


def both(emulated, tensors, mask=None, options=PLAIN):
    return emulated.attention_forward(*tensors, mask, None, None, *options)


def check_forward(case):
    """Output and logsumexp within twice the error of the plain formula."""
    problem = problem_of(case, zlib.crc32(str(case).encode()))
    ours = problem.ours([leaf.detach() for leaf in problem.leaves], 0.0)
    plain, exact = (problem.formula([leaf.to(d) for leaf in problem.leaves]) for d in (case.dtype, torch.float64))
    for name, *results in zip(("out", "lse"), ours, plain, exact, strict=True):
        assert_accurate(*results, name)


# --------------------------------------------------------------------------------------------------
# Values


AXES = [DTYPES, DIMS, (1, 2, 3, 5, 16), (64, 65, 129, 300), MASKS, HEADS, LAYOUTS, SOFTCAPS, (1, 2)]


def products(point):
    dtype, dims, queries, keys, _, heads, _, _, batch = point
    tiles = -(-heads[0] // heads[1] * queries // 16) * heads[1] * batch
    return max(dims) * tiles * keys * (3 if dtype == torch.float32 else 1)


def affordable(point):
    return products(point) <= 64 * 4000


CASES = [
    Case(dtype, dims, queries, keys, mask, 0.0, heads, layout, batch, softcap)
    for dtype, dims, queries, keys, mask, heads, layout, softcap, batch in covering(AXES, affordable, products)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_pair_of_settings(emulator, emulated, case):
    before = launches(emulator)
    check_forward(case)
    assert launches(emulator) == before + 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (4, 1)], ids=str)
def test_a_long_cache(emulator, emulated, dtype, heads):
    """As long as that of the shape ``decode``, in 6 splits."""
    before = launches(emulator, "attention_combine")
    check_forward(Case(dtype, (64, 64), 1, 2048, "none", 0.0, heads, "BHND", 1))
    assert launches(emulator, "attention_combine") == before + 1


@pytest.mark.parametrize("keys", [0, 1, 63, 64, 65])
@pytest.mark.parametrize("queries", [1, 16, 17])
def test_other_problems_take_the_forward_kernel(emulator, emulated, queries, keys):
    before = launches(emulator)
    check_forward(Case(torch.bfloat16, (64, 64), queries, keys, heads=(4, 2)))
    assert launches(emulator) - before == (queries <= 16 and keys >= 64)


def test_dropout_and_wide_heads_take_the_forward_kernel(emulator, emulated):
    before = launches(emulator)
    attention(*operands(), dropout_p=0.5)
    attention(*operands(dims=(264, 264), keys=64))
    assert launches(emulator) == before


def test_gradients_are_those_of_the_formula(emulated):
    """The backward pass takes the output and the logsumexp of the decode kernel."""
    check(Case(torch.bfloat16, (16, 24), 2, 200, "window", heads=(4, 2)), torch.device("cpu"))


# --------------------------------------------------------------------------------------------------
# Masked keys


def test_rows_without_a_visible_key_give_zero(emulated):
    tensors = operands((4, 2), 3, 200)
    mask = torch.rand(1, 4, 3, 200) > 0.5
    mask[:, 1] = mask[:, :, 2] = False
    float_mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    for given in (mask, float_mask, float_mask.bfloat16(), torch.zeros(1, 1, 1, 200, dtype=torch.bool)):
        out, lse = attention(*tensors, given, enable_gqa=True, return_lse=True)
        dead = given.expand(1, 4, 3, 200) == (False if given.dtype == torch.bool else -math.inf)
        dead = dead.all(-1)
        assert (out[dead] == 0).all()
        assert (lse[dead] == -math.inf).all()
        assert lse[~dead].isfinite().all()
        assert out[~dead].isfinite().all()


def test_a_lowest_finite_mask_is_not_an_exclusion(emulated):
    """Masks of the lowest float for every key: the weights are equal."""
    query, key, value = operands()
    mask = torch.full((1, 1, 1, 300), torch.finfo(torch.float32).min)
    out = attention(query, key, value, mask)
    torch.testing.assert_close(out.float(), value.float().mean(2, keepdim=True), rtol=0, atol=2e-3)


KEPT = torch.arange(2048) < 300


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["bool", "float", "bool per row", "window"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_behind_a_mask_stays_hidden(emulated, dtype, kind, bad):
    query, key, value = operands((4, 2), 2, 400, dtype=dtype)
    kept, options = KEPT[:400], {}
    key[:, :, 300:], value[:, :, 300:] = bad, bad
    if kind == "window":
        options = {"window": (None, 298)}  # of two queries, so that the second attends to key 299
    elif kind == "float":
        options = {"attn_mask": torch.zeros(1, 1, 1, 400).masked_fill(~kept, -math.inf)}
    else:
        options = {"attn_mask": kept.expand(2 if "row" in kind else 1, 400).clone()}
    out, lse = attention(query, key, value, enable_gqa=True, return_lse=True, **options)
    key[:, :, 300:], value[:, :, 300:] = 0, 0
    wanted, wanted_lse = attention(query, key, value, enable_gqa=True, return_lse=True, **options)
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)
    assert out.isfinite().all()


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_keys_that_a_mask_rules_out_are_not_read(emulator, emulated, kind):
    query, key, value = operands(keys=2048)
    mask = KEPT[None, None, None].clone()
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)

    def work(mask):
        before = emulator.statistics().get("attention_decode", {"async_copies": 0, "matrix_products": 0})
        both(emulated, (query, key, value), mask)
        after = emulator.statistics()["attention_decode"]
        return [after[what] - before[what] for what in ("async_copies", "matrix_products")]

    full, part = work(None), work(mask)
    assert all(some <= (320 / 2048 + 0.02) * every for some, every in zip(part, full, strict=True))


# --------------------------------------------------------------------------------------------------
# The static cache


@pytest.mark.parametrize("heads", [(2, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("bound", [{}, {"window": 20}], ids=str)
def test_a_step_with_static_shapes_equals_one_that_grows(emulated, heads, bound):
    """The whole buffer and a mask, so that a CUDA graph can replay it, against what is written so far."""
    torch.manual_seed(0)
    static, growing = (KVCache(1, heads[1], 200, 32, dtype=torch.bfloat16, **bound) for _ in range(2))
    for cache in (static, growing):
        cache.keys.fill_(math.nan), cache.values.fill_(math.nan)  # what is not written is not read
    for length in (70, 1, 1, 3, 1):
        query, key, value = operands(heads, length, length, (32, 32))
        keys, values, mask = static.update(key, value)
        assert keys.shape == (1, heads[1], 200, 32)
        assert mask.shape == (1, 1, length, 200)
        out = attention(query, keys, values, mask, enable_gqa=True)
        grown = growing.mask(length)
        wanted = attention(query, *growing.append(key, value), grown, enable_gqa=True)
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-2)
        assert out.isfinite().all()


# --------------------------------------------------------------------------------------------------
# Schedules


PROBLEMS = {
    "one split": ((12, 6), 1, 200, (64, 64), torch.bfloat16),
    "splits": ((2, 2), 2, 1000, (64, 64), torch.bfloat16),
    "three stages": ((2, 1), 1, 300, (192, 192), torch.float16),
    "float32": ((4, 1), 1, 300, (40, 72), torch.float32),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_schedule_gives_the_same_bits(emulator, emulated, name):
    tensors = operands(*PROBLEMS[name])
    mask = torch.rand(1, 1, 1, tensors[1].size(2)) > 0.3
    results = []
    for schedule in range(5):
        emulator.configure(seed=schedule)
        results.append([*both(emulated, tensors), *both(emulated, tensors, mask)])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(others, results[0], strict=True))


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_barrier_and_no_wait_can_be_left_out(emulator, emulated, name):
    tensors = operands(*PROBLEMS[name])
    waits = "sync_block|sync_warp|async_copy_wait"
    assert_no_site_can_be_left_out(emulator, lambda: both(emulated, tensors), "attention_(decode|combine)", waits=waits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (128, 128), (192, 192), (256, 256)], ids=str)
def test_decode_has_no_bank_conflicts(emulator, emulated, dims, dtype):
    conflicts = lambda: emulator.statistics().get("attention_decode", {"bank_conflicts": 0})["bank_conflicts"]  # noqa: E731
    before = conflicts()
    both(emulated, operands((6, 6), 2, 130, dims, dtype))
    assert conflicts() == before


# --------------------------------------------------------------------------------------------------
# The plan


def decode_plan(shape, key_heads=None, **kwargs):
    batch, heads, queries, keys, key_dim, value_dim = shape
    sizes = (batch, heads, key_heads or heads, queries, keys, key_dim, value_dim)
    plans = backend.plans.attention_plan(*sizes, **{"element_size": 2, "multiprocessors": 132, **kwargs})
    return plans.get("decode")


@needs_module
def test_keys_are_split_until_the_grid_is_large_enough():
    shape = ATTENTION_SHAPES["decode"]
    sizes = (shape.heads, shape.queries, shape.keys, shape.key_dim, shape.value_dim)
    many, one = decode_plan((shape.batch, *sizes)), decode_plan((1, *sizes))
    assert (many["blocks"], many["slices"]) == (512, 1)
    assert (one["blocks"], one["slices"]) == (8, 16), "128 keys each"
    long = decode_plan((1, 8, 1, 32768, 64, 64))
    assert long["blocks"] == 8
    assert 0.9 * 264 <= 8 * long["slices"] <= 264, "two blocks for each multiprocessor"


@needs_module
def test_heads_that_share_a_key_head_share_a_block():
    grouped, own = decode_plan((1, 32, 1, 4096, 128, 128), 8), decode_plan((1, 32, 1, 4096, 128, 128))
    assert (grouped["blocks"], own["blocks"]) == (8, 32)
    assert decode_plan((1, 32, 16, 4096, 128, 128), 8)["blocks"] == 8 * 4


@needs_module
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
def test_splits_have_keys_and_blocks_have_room(element_size, multiprocessors):
    for dim in (8, 64, 72, 128, 192, 256):
        for batch in (1, 3, 20, 200):
            for keys in (64, 100, 1000, 32768):
                plan = decode_plan((batch, 4, 1, keys, dim, dim), None, element_size=element_size,
                                   multiprocessors=multiprocessors)  # fmt: skip
                assert plan["shared_bytes"] <= 99 * 1024
                assert 1 <= plan["slices"] <= max(1, keys // 128)
                assert plan["warps"] * plan["slices"] <= max(4, -(-keys // plan["block_n"]))
                assert (plan["slices"] == 1) == (plan["blocks"] >= 2 * multiprocessors or keys < 256)


@needs_module
def test_other_problems_have_no_decode_plan():
    assert decode_plan((1, 8, 17, 2048, 64, 64)) is None
    assert decode_plan((1, 8, 1, 63, 64, 64)) is None
    assert decode_plan((1, 8, 1, 2048, 264, 264)) is None
