"""The CUDA kernels of tangents and second derivatives of wide heads, run on the host: values, schedules, barriers."""

from __future__ import annotations

import math

import pytest
import torch

import fastgen
from benchmarks.shapes import ATTENTION_SHAPES
from fastgen.testing import largest_error
from tests.emulator import build
from tests.ops.attention_cases import Case, check_second_order
from tests.ops.test_attention_kernels import (
    PLAIN,
    SHARED_LIMITS,
    assert_no_site_can_be_left_out,
    emulated,  # noqa: F401  (a fixture)
    needs_module,
    operands,
    plan,
)

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
SMALL, AMPERE, HOPPER = SHARED_LIMITS
KERNELS = [f"attention_{kernel}_wide" for kernel in ("tangent", "second_order_query", "second_order_key_value")]
OPTIONS = PLAIN._replace(scale=0.05)

CASES = [
    Case(torch.bfloat16, (512, 512), 18, 20, batch=1, heads=(1, 1)),
    Case(torch.float32, (300, 268), 3, 17, "window", 0.3, batch=1, heads=(2, 1), layout="odd", softcap=1.5),
    Case(torch.float16, (264, 400), 20, 31, "causal", batch=2, heads=(4, 2), layout="BNHD"),
    Case(torch.float32, (512, 512), 17, 9, batch=1, heads=(1, 1)),
    Case(torch.bfloat16, (512, 72), 40, 50, "bool", 0.3, batch=1, heads=(3, 1), layout="packed", softcap=1.5),
    Case(torch.float16, (40, 512), 20, 40, "bool per key", batch=2, heads=(1, 1)),
    Case(torch.float32, (512, 260), 18, 20, "bool per row", batch=1, heads=(1, 1)),
    Case(torch.bfloat16, (320, 320), 1, 3, "bool and causal", batch=1, heads=(1, 1)),
]


def work(emulator, what="launches"):
    return [emulator.statistics().get(kernel, {what: 0})[what] for kernel in KERNELS]


def formula(tensors, mask=None, seed=None, options=OPTIONS, sequences=None):
    """out and the logsumexp, from float64."""
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    out, lse = torch.ops.fastgen_torch.attention_forward(*doubles(tensors), mask, seed, sequences, *options)
    return out.to(tensors[0]), lse if tensors[0].dtype == torch.float64 else lse.float()


def second_order(
    operators,
    tensors,
    directions=None,
    mask=None,
    seed=None,
    options=OPTIONS,
    mask_grad=False,
    sequences=None,
    output=None,
):
    """What the two operators give; out and the logsumexp are ``output``, or those of the formula in float64."""
    out, lse = output or formula(tensors, mask, seed, options, sequences)
    directions = [t.flip(-2) for t in tensors] + [None] if directions is None else directions
    upstream = torch.ones_like(out), torch.ones_like(lse)
    rest = (*tensors, out, lse, mask, seed, sequences, *directions, *options)
    return [*operators.attention_tangent(*rest), *operators.attention_second_order(*upstream, *rest, mask_grad)]


def doubles(tensors):
    return [t if t is None else t.double() for t in tensors]


def assert_like_the_formula(operators, tensors, directions=None, mask=None, options=OPTIONS, sequences=None):
    ours = second_order(operators, tensors, directions, mask, None, options, False, sequences)
    exact = second_order(
        torch.ops.fastgen_torch, doubles(tensors), directions and doubles(directions),
        mask if mask is None else mask.double(), None, options, False, sequences,
    )  # fmt: skip
    share = 1e-5 if tensors[0].dtype == torch.float32 else 2e-2
    for a, b in zip(ours, exact, strict=True):
        if b.numel():
            assert largest_error(a, b) <= share * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize(
    "case", [*CASES[:2], *(pytest.param(one, marks=pytest.mark.slow) for one in CASES[2:])], ids=str
)
def test_any_kind_of_problem(emulator, emulated, case):  # noqa: F811
    emulator.configure(seed=3, shared_limit=SHARED_LIMITS[CASES.index(case) % 3], rounding="any")
    before = work(emulator)
    with fastgen.use_backend("emulated"):
        check_second_order(case, torch.device("cpu"), 3)
    assert [now - then for now, then in zip(work(emulator), before, strict=True)] == [2, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("limit", SHARED_LIMITS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_kind_of_problem_on_every_architecture(emulator, emulated, case, limit):  # noqa: F811
    emulator.configure(seed=limit % 1000, shared_limit=limit, rounding="any")
    with fastgen.use_backend("emulated"):
        check_second_order(case, torch.device("cpu"), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_float_masks_and_their_tangents(emulated, dtype):  # noqa: F811
    full = dtype == torch.bfloat16
    tensors = operands(batch=2 if full else 1, heads=1, queries=17, keys=20, dims=(264, 320), dtype=dtype)
    for sizes in ((2, 1, 1, 20), (1, 1, 17, 1), (1, 1, 17, 20)) if full else ((1, 1, 17, 20),):
        mask = torch.randn(sizes)
        mask[..., ::7] = -math.inf
        assert_like_the_formula(emulated, tensors, [*(t.flip(-2) for t in tensors), torch.randn(sizes)], mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_packed_sequences(emulated, dtype):  # noqa: F811
    tensors = operands(queries=25, keys=28, dims=(264, 8), dtype=dtype)
    sequences = torch.tensor([[0, 18, 18, 25], [0, 9, 17, 28]], dtype=torch.int32)
    options = OPTIONS._replace(window_left=9)
    assert_like_the_formula(emulated, [tensors[0], *(t[:, :1] for t in tensors[1:])], None, None, options, sequences)


def test_an_absent_tangent_costs_nothing_and_means_zero(emulator, emulated):  # noqa: F811
    tensors = operands(heads=1, queries=17, keys=16, dims=(264, 320))

    def products(absent):
        before = sum(work(emulator, "matrix_products"))
        assert_like_the_formula(emulated, tensors, [None if i in absent else t for i, t in enumerate(tensors)] + [None])
        return sum(work(emulator, "matrix_products")) - before

    full = products(())
    for absent in ((0,), (1,), (2,), (0, 1, 2)):
        assert products(absent) < full


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_the_same_bits_under_every_schedule_and_on_every_architecture(emulator, emulated, dtype):  # noqa: F811
    lengths = {"queries": 33, "keys": 34} if dtype == torch.float16 else {"queries": 17, "keys": 9}
    tensors, seed = operands(heads=1, dims=(512, 264), dtype=dtype, **lengths), torch.tensor([5])
    results = []
    for schedule, limit in enumerate((SMALL, HOPPER, AMPERE)):
        emulator.configure(seed=schedule, shared_limit=limit)
        options = OPTIONS._replace(window_left=20, dropout_p=0.3)
        results.append(second_order(emulated, tensors, seed=seed, options=options))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("kernel", "limit"),
    [
        ("tangent", SMALL),
        ("tangent", HOPPER),
        ("second_order", SMALL),
        pytest.param("second_order", HOPPER, marks=pytest.mark.slow),
    ],
)
def test_no_barrier_and_no_wait_can_be_left_out(emulator, emulated, limit, kernel):  # noqa: F811
    tensors, waits = operands(heads=1, queries=17, keys=33, dims=(72, 264)), "sync_block|sync_warp|async_copy_wait"
    call = lambda: second_order(emulated, tensors)  # noqa: E731
    assert_no_site_can_be_left_out(emulator, call, rf"attention_{kernel}\S*_wide", 1, waits, shared_limit=limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_what_is_masked_does_not_matter_even_if_it_is_nan(emulated, dtype):  # noqa: F811
    """A window leaves out the last keys. The last query attends to keys of the second tile alone."""
    tensors = operands(heads=1, queries=20, keys=30, dims=(264, 8), dtype=dtype)
    options = OPTIONS._replace(window_left=2, window_right=3)
    directions = [*(t.flip(-1) for t in tensors), None]
    output = formula(tensors, options=options)
    clean = second_order(emulated, tensors, directions, options=options, output=output)
    tensors[1][:, :, 24:], tensors[2][:, :, 24:] = math.nan, math.inf
    directions[1][:, :, 24:], directions[2][:, :, 24:] = math.nan, math.inf
    found = second_order(emulated, tensors, directions, options=options, output=output)
    for of_clean, of_found in zip(clean[:-1], found[:-1], strict=True):
        assert torch.equal(of_clean[:, :, :23], of_found[:, :, :23])
    tensors[0][:, :, 19], directions[0][:, :, 19] = math.nan, math.inf
    found = second_order(emulated, tensors, directions, options=options, output=output)
    for of_clean, of_found in zip(clean[:-1], found[:-1], strict=True):
        assert torch.equal(of_clean[:, :, :16], of_found[:, :, :16])


def test_tf32_is_taken_only_where_it_is_allowed(emulated):  # noqa: F811
    tensors = operands(heads=1, queries=17, keys=20, dims=(264, 264), dtype=torch.float32)
    exact, errors = second_order(torch.ops.fastgen_torch, doubles(tensors)), []
    for allowed in (False, True):
        ours = second_order(emulated, tensors, options=OPTIONS._replace(allow_tf32=allowed))
        shares = [largest_error(a, b) / float(b.abs().max()) for a, b in zip(ours, exact, strict=True) if b.numel()]
        errors.append(max(shares))
    assert errors[0] < 5e-6 < 5e-5 < errors[1] < 5e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradient_of_a_mask(emulated, dtype):  # noqa: F811
    """Of any broadcast, and in parts. The sum over all is 0."""
    full = dtype == torch.bfloat16
    tensors = operands(batch=2, heads=1, queries=18, keys=17 if full else 9, dims=(264, 8), dtype=dtype)
    for sizes in ((1, 1, 18, 17), (2, 1, 1, 17), (1, 1, 18, 1)) if full else ((1, 1, 1, 9), (1, 1, 1, 1)):
        mask, directions = torch.randn(sizes), [*(t.flip(-2) for t in tensors), torch.randn(sizes)]
        options = OPTIONS._replace(softcap=1.5, window_left=12)
        ours = second_order(emulated, tensors, directions, mask, options=options, mask_grad=True)[-1]
        exact = second_order(
            torch.ops.fastgen_torch, doubles(tensors), doubles(directions), mask.double(), None, options, True
        )[-1]
        share = 1e-5 if dtype == torch.float32 else 2e-2
        assert largest_error(ours, exact) <= share * max(1.0, float(exact.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1, 17), (1, 1, 5, 1)], ids=["per key", "per row"])
def test_no_barrier_of_the_mask_gradient_can_be_left_out(emulator, emulated, sizes):  # noqa: F811
    """So many heads that a block takes several."""
    tensors, mask = operands(batch=26, heads=1, queries=5, keys=17, dims=(264, 8)), torch.ones(sizes)
    call = lambda: second_order(emulated, tensors, [None] * 4, mask, mask_grad=True)  # noqa: E731
    assert_no_site_can_be_left_out(emulator, call, "attention_mask_second_order_wide", seeds=1)


@needs_module
@pytest.mark.parametrize("element_size", [2, 4])
def test_every_architecture_has_room_for_them(element_size):
    for limit, stages in ((SMALL, 1), (AMPERE, 2), (HOPPER, 2)):
        plans = plan(ATTENTION_SHAPES["vae-mid"], element_size=element_size, shared_limit=limit)
        for kernel in ("tangent", "second order query", "second order key_value"):
            chosen = plans[kernel]
            assert (chosen["tile"], chosen["warps"], chosen["stages"]) == ((512, 512), 8, stages)
            assert chosen["shared_bytes"] <= limit
