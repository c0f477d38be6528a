"""What the attention kernels do with the shared memory of each architecture: stages, query buffers, kernels."""

from __future__ import annotations

import math

import pytest
import torch

import fastgen
from benchmarks.shapes import ATTENTION_SHAPES
from fastgen import backend
from fastgen.functional import varlen_attention
from fastgen.testing import assert_accurate
from tests.emulator import build
from tests.ops import test_packed
from tests.ops.attention_cases import Case, check
from tests.ops.test_attention_kernels import (
    PLAIN,
    SHARED_LIMITS,
    assert_no_site_can_be_left_out,
    gradients,
    needs_module,
    operands,
    passes,
    plan,
)
from tests.ops.test_attention_second_order_kernels import second_order

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
SMALL, AMPERE, HOPPER = SHARED_LIMITS
KIB = 1024


@pytest.fixture
def emulated(emulator):
    build.register()
    return torch.ops.fastgen_emulated


def resident(chosen, limit):
    """Blocks of a launch per multiprocessor, as far as shared memory is concerned."""
    return (limit + KIB) // (chosen["shared_bytes"] + KIB)


@needs_module
@pytest.mark.parametrize("limit", SHARED_LIMITS)
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", ["sagan-64", "transgan-window", "char-lm", "image-lm"])
def test_two_blocks_of_head_dims_up_to_64_share_a_multiprocessor_of_every_architecture(name, plain, limit):
    found = plan(ATTENTION_SHAPES[name], plain=plain, shared_limit=limit)
    for kernel in ("forward", "query", "key_value"):
        assert resident(found[kernel], limit) >= 2, kernel
        assert found[kernel]["warps"] == 4


@needs_module
def test_stages_and_query_buffers_are_as_many_as_leave_room_for_two_blocks():
    shape = ATTENTION_SHAPES["image-lm"]
    row = 2 * 64 + 16
    assert plan(shape, shared_limit=AMPERE)["forward"]["shared_bytes"] == (2 * 128 + 4 * 64) * row
    assert plan(shape, shared_limit=SMALL)["forward"]["shared_bytes"] == (128 + 2 * 64) * row
    # The tiles of the masked kernel are smaller: one query buffer less is enough.
    assert plan(shape, shared_limit=SMALL, plain=False)["forward"]["shared_bytes"] == (128 + 4 * 32) * row
    assert [plan(shape, shared_limit=limit)["query"]["stages"] for limit in SHARED_LIMITS] == [1, 2, 2]
    with pytest.raises(ValueError, match="shared_limit: less than every GPU from sm_80 on has"):
        plan(shape, shared_limit=SMALL - 1)


@needs_module
def test_tangents_and_second_order_have_one_stage_where_two_leave_no_room_for_a_second_block():
    kernels = ("tangent", "second order query", "second order key_value")

    def stages_and_blocks(name, limit):
        found = plan(ATTENTION_SHAPES[name], shared_limit=limit)
        return [(found[kernel]["stages"], resident(found[kernel], limit)) for kernel in kernels]

    # The rows that a block of dK and dV owns are too many for two blocks; then it has two stages.
    assert stages_and_blocks("image-lm", SMALL) == [(1, 2), (1, 2), (2, 1)]
    assert stages_and_blocks("image-lm", AMPERE) == [(2, 2)] * 3
    assert stages_and_blocks("dit-xl", AMPERE) == [(2, 2), (1, 2), (1, 2)]
    assert stages_and_blocks("long", AMPERE) == [(1, 2)] * 3
    assert stages_and_blocks("long", HOPPER) == [(1, 3), (2, 2), (2, 2)]


@needs_module
def test_a_grid_with_fewer_blocks_than_multiprocessors_takes_all_stages():
    shape = ATTENTION_SHAPES["image-lm"]
    sizes = (1, 16, 16, shape.queries, shape.keys, 64, 64, 2, 132)
    assert backend.plans.attention_plan(*sizes, shared_limit=SMALL)["forward"]["stages"] == 2
    assert backend.plans.attention_plan(*sizes[:-1], 127, shared_limit=SMALL)["forward"]["stages"] == 1


@needs_module
def test_wide_heads_have_more_stages_where_there_is_room():
    wide = ATTENTION_SHAPES["vae-mid"]
    small, ampere, hopper = (plan(wide, shared_limit=limit)["forward"] for limit in SHARED_LIMITS)
    assert (small["slices"], small["warps"], small["block_m"]) == (2, 4, 64)
    for chosen, stages in ((ampere, 1), (hopper, 2)):
        assert (chosen["slices"], chosen["warps"], chosen["block_m"], chosen["stages"]) == (1, 8, 64, stages)


@needs_module
@pytest.mark.parametrize(
    ("batch", "keys", "multiprocessors", "splits"),
    [(1, 4096, 132, 2), (1, 4096, 108, 3), (1, 128, 132, 1), (2, 4096, 132, 1), (3, 4096, 132, 1)],
)
def test_keys_of_wide_heads_are_split_where_blocks_are_fewer_than_multiprocessors(batch, keys, multiprocessors, splits):
    sizes = (batch, 1, 1, 4096, keys, 512, 512, 2, multiprocessors)
    found = backend.plans.attention_plan(*sizes, shared_limit=AMPERE)["forward"]
    assert found.get("splits", 1) == splits
    assert found["blocks"] == batch * 64


@pytest.mark.parametrize("dims", [(24, 40), pytest.param((128, 128), marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_architecture_gives_the_same_bits(emulator, emulated, dims, dtype):
    """With a mask, whose tiles are smaller, and without; several blocks, so that the plans differ."""
    tensors = operands(batch=2, queries=130, keys=140, dims=dims, dtype=dtype)
    bias = torch.randn(1, 1, 130, 140)
    for mask in (None, bias) if dtype == torch.bfloat16 else (bias,):  # products of float32 take three times as long
        results = []
        for limit in SHARED_LIMITS:
            emulator.configure(shared_limit=limit)
            results.append(gradients(emulated, tensors, mask))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_every_architecture_gives_the_same_bits_in_second_order(emulator, emulated, dtype):
    """Several blocks and tiles; the smallest GPU has one stage where the others have two."""
    tensors = operands(batch=2, heads=2, queries=70, keys=80, dims=(64, 64), dtype=dtype)
    stages, results = [], []
    for limit in SHARED_LIMITS:
        emulator.configure(shared_limit=limit)
        results.append(second_order(emulated, tensors, torch.ones(1, 1, 1, 80)))
        size = tensors[0].element_size()
        found = backend.plans.attention_plan(2, 2, 2, 70, 80, 64, 64, size, 3, plain=False, shared_limit=limit)
        stages.append(found["tangent"]["stages"])
    assert stages == [1, 2, 2]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_barrier_and_no_wait_of_one_stage_can_be_left_out(emulator, emulated):
    """So many blocks that the small GPUs' plan has one stage."""
    tensors = operands(batch=4, heads=1, queries=20, keys=140, dims=(64, 64))
    for call in passes(emulated, tensors):
        assert_no_site_can_be_left_out(emulator, call, "attention_")


# --------------------------------------------------------------------------------------------------
# Wide heads

WIDE = [
    Case(torch.bfloat16, (512, 512), 64, 64, batch=1, heads=(1, 1)),
    Case(torch.float16, (512, 512), 17, 33, batch=2, heads=(4, 2)),
    Case(torch.bfloat16, (300, 264), 65, 31, layout="odd", batch=1),
    Case(torch.float16, (264, 400), 70, 130, "causal", batch=1, heads=(1, 1)),
    Case(torch.bfloat16, (512, 512), 81, 97, "window", batch=1, heads=(1, 1), softcap=1.5),
    Case(torch.float16, (320, 512), 50, 100, "bool", 0.3, batch=1, layout="BNHD"),
    Case(torch.bfloat16, (512, 320), 50, 100, "bool per key", 0.3, batch=2, heads=(3, 1), layout="packed"),
    Case(torch.float16, (512, 512), 40, 70, "bool per row", batch=1),
    Case(torch.bfloat16, (512, 512), 40, 40, "float with holes", batch=1),
    Case(torch.float16, (512, 512), 66, 40, "float and window", 0.3, batch=1, softcap=1.5, heads=(1, 1)),
    Case(torch.bfloat16, (512, 512), 19, 1, batch=1),
]
# One block, so that its keys are split: the emulator's GPU has three multiprocessors.
SPLIT = [
    Case(torch.bfloat16, (512, 512), 40, 300, batch=1, heads=(1, 1)),
    Case(torch.float16, (512, 264), 60, 400, "causal window", batch=1, heads=(1, 1), layout="BNHD"),
    Case(torch.bfloat16, (264, 512), 20, 257, "float per key", 0.3, batch=1, heads=(1, 1), softcap=1.5),
    Case(torch.float16, (512, 512), 33, 260, "bool per row", batch=1, heads=(1, 1), layout="odd"),
]


def in_turn(index, case, limit):
    """The stages are a number of the plan, of which masks and dropout know nothing: the limits take turns in CI."""
    slow = case in WIDE and limit != (AMPERE, HOPPER)[index % 2]
    return pytest.param(case, limit, id=f"{case}-{limit}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    ("case", "limit"),
    [in_turn(index, case, limit) for index, case in enumerate([*WIDE, *SPLIT]) for limit in (AMPERE, HOPPER)],
)
def test_wide_heads(emulator, emulated, case, limit):
    emulator.configure(seed=len(str(case)), shared_limit=limit, rounding="any")
    before = launches(emulator)
    with fastgen.use_backend("emulated"):
        check(case, torch.device("cpu"), 3)
    taken = [case.queries > 16, case in SPLIT, case.queries > 16, case.keys > 16]
    assert [now - then for now, then in zip(launches(emulator), before, strict=True)] == taken


def launches(emulator):
    kernels = ("forward_wide", "combine", "backward_query_wide", "backward_key_value_wide")
    return [emulator.statistics().get(f"attention_{kernel}", {"launches": 0})["launches"] for kernel in kernels]


@pytest.mark.parametrize("window", [(None, None), (20, -3)], ids=str)
def test_packed_sequences_of_wide_heads(emulator, emulated, window):
    emulator.configure(seed=3, shared_limit=AMPERE)
    before = launches(emulator)
    tensors = test_packed.problem(test_packed.LONG, (2, 1), (512, 264), torch.bfloat16)
    queries, keys = map(test_packed.positions, test_packed.LONG)
    options = {"window": window, "enable_gqa": True, "return_lse": True}
    first_order = test_packed.derivatives_of_first_order
    with fastgen.use_backend("emulated"):
        ours = first_order(lambda *t: varlen_attention(*t, queries, keys, **options), tensors)
    right, wide = test_packed.formula(test_packed.LONG, window), [t.detach().double().requires_grad_() for t in tensors]
    for i, (mine, plain, exact) in enumerate(
        zip(ours, first_order(right, tensors), first_order(right, wide), strict=True)
    ):
        size = float(exact.detach()[exact.isfinite()].abs().max())
        assert_accurate(mine, plain, exact, f"result {i}", 0 if i < 2 else 4 * torch.finfo(torch.bfloat16).eps * size)
    assert [now - then for now, then in zip(launches(emulator), before, strict=True)] == [1, 0, 1, 1]


@pytest.mark.parametrize("limit", [AMPERE, HOPPER])
def test_wide_heads_give_the_same_bits_under_every_schedule_and_on_every_architecture_that_takes_them(
    emulator, emulated, limit
):
    tensors, options = operands(heads=1, queries=70, keys=50, dims=(512, 512)), PLAIN._replace(window_left=40)
    results = []
    for schedule, memory in enumerate((HOPPER, limit, limit)):
        emulator.configure(seed=schedule, shared_limit=memory)
        results.append(gradients(emulated, tensors, options=options))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("limit", [AMPERE, HOPPER])
def test_no_barrier_and_no_wait_of_wide_heads_can_be_left_out(emulator, emulated, limit):
    tensors, mask = operands(heads=1, queries=40, keys=70, dims=(512, 512)), torch.rand(1, 1, 40, 70) > 0.5
    waits = "sync_block|sync_named|arrive_named|async_copy_wait"
    for call in passes(emulated, tensors, mask):
        assert_no_site_can_be_left_out(emulator, call, r"\S*_wide", 1, waits, shared_limit=limit)


def test_values_of_keys_that_no_query_attends_to_do_not_matter(emulator, emulated):
    """Also inf and NaN: a weight of 0 times them is NaN. Here a window leaves out the last keys of a tile."""
    emulator.configure(shared_limit=AMPERE)
    tensors = operands(heads=1, queries=20, keys=60, dims=(512, 512))
    clean = emulated.attention_forward(*tensors, None, None, None, *PLAIN._replace(window_right=3))
    tensors[2][:, :, 24:] = math.nan
    found = emulated.attention_forward(*tensors, None, None, None, *PLAIN._replace(window_right=3))
    assert torch.equal(clean[0], found[0])
