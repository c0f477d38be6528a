"""The kernel that computes all gradients of heads whose keys fit one block, run in the emulator."""

from __future__ import annotations

import math
import re

import pytest
import torch

import fastgen
from benchmarks.shapes import ATTENTION_SHAPES
from tests.emulator import build
from tests.ops.attention_cases import Case, check
from tests.ops.backward_kernels import GENERAL, PLAIN, backward, gradients, launches, needs_module, operands, plan

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

KERNEL = "attention_backward_one_head"


@pytest.fixture
def emulated(emulator):
    build.register()
    emulator.configure(shared_limit=163 * 1024)
    return torch.ops.fastgen_emulated


CASES = [
    Case(torch.bfloat16, (64, 64), 70, 256),
    Case(torch.float16, (40, 64), 33, 193, "causal", layout="odd"),
    Case(torch.bfloat16, (64, 40), 20, 224, "causal window", layout="BNHD"),
    Case(torch.bfloat16, (48, 33), 1, 255, "window", layout="packed"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(emulated, emulator, case):
    def call():
        with fastgen.use_backend("emulated"):
            check(case, torch.device("cpu"), 3)

    found = launches(emulator, call)
    assert found[KERNEL] == 1
    assert not found.keys() & set(GENERAL)


def test_more_queries_than_keys_under_a_causal_mask(emulated, emulator):
    """The last queries see all keys; with a window the last ones see none, and their gradients are zeros."""
    tensors = operands(queries=240, keys=200, dims=(64, 64))
    for options in (PLAIN._replace(window_right=0), PLAIN._replace(window_left=4, window_right=4)):
        found = gradients(emulated, tensors, options=options)[:3]
        exact = gradients(torch.ops.fastgen_torch, [t.double() for t in tensors], options=options)[:3]
        for got, wanted in zip(found, exact, strict=True):
            assert float((got - wanted).abs().max()) < 0.02 * float(wanted.abs().max())
    assert not found[0][:, :, 204:].any()
    assert emulator.statistics()[KERNEL]["launches"] >= 2


@pytest.mark.parametrize("place", range(3), ids=["query", "key", "value"])
def test_what_is_outside_of_every_window_may_be_anything(emulated, place):
    """Queries from 204 on attend to no key of 200, keys from 30 on no query of 20."""
    queries, keys = (240, 200) if place == 0 else (20, 200)
    options = PLAIN._replace(window_left=4, window_right=4 if place == 0 else 10)
    tensors = operands(queries=queries, keys=keys, dims=(64, 64))
    clean = gradients(emulated, tensors, options=options)
    for bad in (math.nan, math.inf):
        tensors[place][:, :, 204 if place == 0 else 30 :] = bad
        for got, wanted in zip(gradients(emulated, tensors, options=options)[:3], clean[:3], strict=True):
            assert torch.equal(got, wanted)


def test_every_schedule_gives_the_same_bits(emulator, emulated):
    tensors, results = operands(queries=40, keys=256, dims=(64, 64)), []
    for schedule in range(3):
        emulator.configure(seed=schedule, shared_limit=163 * 1024)
        results.append(torch.cat([t.float().flatten() for t in gradients(emulated, tensors)]))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_no_barrier_and_no_wait_can_be_left_out(emulator, emulated):
    tensors = operands(batch=3, heads=1, queries=65, keys=200, dims=(40, 40))
    call = backward(emulated, tensors)
    call()
    pattern = rf"(sync_block|async_copy_wait) csrc/attention/\S+ in {KERNEL}"
    # Of delta, of dS, and of the pipeline: its waits and barriers for one stage are not reached.
    sites = [site for site in emulator.sites() if re.match(pattern, site)]
    assert len(sites) == 4
    for site in sites:
        emulator.configure(leave_out=site, shared_limit=163 * 1024)
        with pytest.raises(RuntimeError, match="emulator: "):
            call()


def test_five_products_and_every_operand_read_once(emulator, emulated):
    tensors = operands(queries=64, keys=256, dims=(64, 64))

    def work():
        return dict(emulator.statistics().get(KERNEL, {}))

    before = work()
    gradients(emulated, tensors)
    done = {name: count - before.get(name, 0) for name, count in work().items()}
    heads, product = 4, 256 // 16 * (64 // 8) * (64 // 16)
    assert done["matrix_products"] == heads * 5 * product
    copies, rows = 2 * (64 + 256) * 64 * 2 // 16, 2 * 64
    assert done["async_copies"] == heads * (copies // 32 + rows * 8 // 32)
    assert done["bank_conflicts"] == 0


# --------------------------------------------------------------------------------------------------
# Which problems take it


@needs_module
def test_named_shapes_of_256_keys_and_head_dim_64_take_it():
    for name, shape in ATTENTION_SHAPES.items():
        sizes = (shape.batch, shape.heads, shape.heads, shape.queries, shape.keys, shape.key_dim, shape.value_dim)
        assert ("one head" in plan(*sizes)) == (name in ("transgan-window", "char-lm"))
    found = plan(64, 6, 6, 256, 256, 64, 64)["one head"]
    assert (found["blocks"], found["block_m"], found["block_n"], found["warps"]) == (384, 32, 256, 8)


@needs_module
def test_what_it_leaves_to_the_other_kernels():
    assert "one head" in plan(33, 4, 4, 10, 193, 40, 64)
    for other in [
        plan(32, 4, 4, 10, 193, 40, 64),  # fewer heads than multiprocessors
        plan(64, 4, 2, 256, 256, 64, 64),
        plan(64, 4, 4, 256, 192, 64, 64),
        plan(64, 4, 4, 256, 257, 64, 64),
        plan(64, 4, 4, 256, 256, 72, 64),
        plan(64, 4, 4, 256, 256, 32, 32),
        plan(64, 4, 4, 256, 256, 64, 64, element_size=4),
        plan(64, 4, 4, 256, 256, 64, 64, plain=False),
        plan(64, 4, 4, 256, 256, 64, 64, shared_limit=99 * 1024),
    ]:
        assert "one head" not in other


def test_masks_and_grouped_heads_take_the_other_kernels(emulator, emulated):
    tensors = operands(queries=17, keys=200, dims=(40, 40))
    grouped = [torch.cat([tensors[0], tensors[0]], 1), *tensors[1:]]
    for arguments in ((tensors, torch.rand(2, 1, 17, 200) > 0.3), (grouped, None)):
        found = launches(emulator, lambda: gradients(emulated, *arguments))  # noqa: B023
        assert KERNEL not in found
        assert found.keys() >= set(GENERAL)
