"""The kernel that computes all gradients of problems whose scores of a head fit one tile, run in the emulator."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastgen
from benchmarks.shapes import ATTENTION_SHAPES
from fastgen.ops.attention.problem import Options
from tests.emulator import build
from tests.ops.attention_cases import DROPOUT, DTYPES, LAYOUTS, MASKS, Case, check
from tests.ops.backward_kernels import GENERAL, PLAIN, backward, gradients, launches, needs_module, operands, plan

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

KERNEL = "attention_backward_one_tile"
OF_MASK = "attention_mask_gradient"
DIMS = [(8, 8), (5, 3), (32, 32), (40, 24), (64, 64), (72, 72), (128, 128)]


@pytest.fixture
def emulated(emulator):
    build.register()
    return torch.ops.fastgen_emulated


# --------------------------------------------------------------------------------------------------
# Values


@st.composite
def cases(draw):
    dtype, dims = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DIMS))
    most = 96 if dtype != torch.float32 and max(dims) <= 64 else 64
    if dtype == torch.float32 and max(dims) > 64:
        dims = (64, 64)
    lengths = st.integers(1, most)
    rest = [draw(st.sampled_from(axis)) for axis in (MASKS, DROPOUT)]
    return Case(dtype, dims, draw(lengths), draw(lengths), *rest, (2, 2), draw(st.sampled_from(LAYOUTS)))


def takes_one_kernel(emulator, case, schedule):
    emulator.configure(seed=schedule)

    def call():
        with fastgen.use_backend("emulated"):
            check(case, torch.device("cpu"), schedule % 1000)

    found = launches(emulator, call)
    assert found[KERNEL] == 1
    assert not found.keys() & set(GENERAL)
    # A learned bias, too, where there are registers and shared memory for its gradient.
    rows, columns = case.queries > 1, case.keys > 1
    reduced = {"float per key": rows, "float per row": columns, "one float": rows or columns}
    large = max(case.queries, case.keys) > 64 or max(case.dims) > 64 or case.dropout > 0
    assert (OF_MASK in found) == ("float" in case.mask and (large or reduced.get(case.mask, False)))


ANY = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@settings(max_examples=60, **ANY)
@given(case=cases(), schedule=st.integers(0, 2**32 - 1))
def test_any_problem_that_fits_under_any_schedule(emulated, emulator, case, schedule):
    takes_one_kernel(emulator, case, schedule)


@pytest.mark.slow
@settings(max_examples=1500, **{**ANY, "derandomize": False})
@given(case=cases(), schedule=st.integers(0, 2**32 - 1))
def test_very_many_problems_that_fit_under_any_schedule(emulated, emulator, case, schedule):
    takes_one_kernel(emulator, case, schedule)


EDGES = [
    *((1, 1), (1, 64), (64, 1), (15, 17), (16, 32), (17, 33), (31, 63)),
    *((48, 20), (64, 64), (65, 64), (64, 80), (96, 96)),
]


@pytest.mark.parametrize("sizes", EDGES, ids=str)
@pytest.mark.parametrize("mask", ["none", "causal window", "float with holes"])
def test_sizes_at_the_edges_of_fragments_and_chunks(emulator, emulated, sizes, mask):
    takes_one_kernel(emulator, Case(torch.float16, (40, 24), *sizes, mask), 3)


def test_a_window_of_each_dtype(emulator, emulated):
    for dtype in DTYPES:
        takes_one_kernel(emulator, Case(dtype, (32, 32), 49, 49, "float", batch=3), 1)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 3), (40, 1), (40, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_gradient_of_a_bias_that_is_broadcast_over_batch_or_heads(emulator, emulated, sizes, dtype):
    """40 x 3 heads: blocks take several on the emulator's GPU, which has few multiprocessors, and parts are added."""
    tensors = operands(batch=40, heads=3, queries=17, keys=20, dims=(8, 8))
    bias = torch.randn(*sizes, 17, 20).to(dtype)
    found = {}

    def call():
        found["grad"] = gradients(emulated, tensors, bias)[-1]

    kernels = launches(emulator, call)
    assert kernels[KERNEL] == 1
    assert OF_MASK not in kernels
    assert ("attention_sum_parts" in kernels) == (sizes[0] == 1)
    exact = gradients(torch.ops.fastgen_torch, [t.double() for t in tensors], bias.double())[-1]
    scale = float(exact.abs().max())
    assert found["grad"].dtype == dtype
    assert found["grad"].shape == bias.shape
    assert float((found["grad"] - exact).abs().max()) < 0.02 * scale


def test_a_bias_without_a_gradient_and_one_beside_dropout(emulator, emulated):
    tensors, bias, seed = operands(), torch.randn(1, 2, 49, 49), torch.tensor([3])
    options = PLAIN._replace(dropout_p=0.3)
    for learned in (False, True):
        grads = gradients(emulated, tensors, bias, seed, options, learned)
        exact = gradients(torch.ops.fastgen_torch, [t.double() for t in tensors], bias.double(), seed, options, learned)
        assert grads[3].numel() == (bias.numel() if learned else 0)
        for grad, of in zip(grads, exact, strict=True):
            if grad.numel():
                assert float((grad - of).abs().max()) < 0.02 * float(of.abs().max())


# --------------------------------------------------------------------------------------------------
# inf and NaN


@pytest.mark.parametrize("kind", ["bool", "float", "bias"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", range(3), ids=["query", "key", "value"])
def test_what_is_masked_may_be_anything(emulated, place, bad, kind):
    """Keys 40 and up are masked for all queries, queries 20 and up for all keys."""
    mask = torch.ones(2, 1, 49, 49, dtype=torch.bool)
    mask[..., 40:], mask[:, :, 20:] = False, False
    if kind != "bool":
        mask = torch.randn(2, 1, 49, 49).masked_fill(~mask, -math.inf)
    tensors = operands()
    clean = gradients(emulated, tensors, mask, learned=kind == "bias")
    tensors[place][:, :, 20 if place == 0 else 40 :] = bad
    for got, wanted in zip(gradients(emulated, tensors, mask, learned=kind == "bias"), clean, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", range(3), ids=["query", "key", "value"])
@pytest.mark.parametrize(("queries", "keys"), [(20, 60), (60, 20)])
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_outside_of_every_window_may_be_anything(emulated, queries, keys, place, bad, masked):
    """With more keys than queries the last keys of a causal call, with more queries the last ones of a window of 4."""
    mask = torch.ones(2, 1, queries, keys, dtype=torch.bool) if masked else None
    options = PLAIN._replace(window_right=0) if keys > queries else PLAIN._replace(window_left=4, window_right=4)
    tensors = operands(queries=queries, keys=keys)
    clean = gradients(emulated, tensors, mask, options=options)
    first = 24 if queries > keys else 20
    if tensors[place].size(2) > first:
        tensors[place][:, :, first:] = bad
    for got, wanted in zip(gradients(emulated, tensors, mask, options=options)[:3], clean[:3], strict=True):
        assert torch.equal(got, wanted)


def test_nan_in_a_visible_key_reaches_what_attends_to_it(emulated):
    tensors = operands()
    tensors[1][0, 0, 7] = math.nan
    query, key, value, _ = gradients(emulated, tensors)
    assert query[0, 0].isnan().all()
    assert value[0, 0].isnan().all()
    for grad in (query, key, value):
        assert not grad[0, 1].isnan().any()
        assert not grad[1].isnan().any()


def test_a_row_without_keys_gives_zeros(emulated):
    mask = torch.rand(2, 1, 49, 49) > 0.5
    mask[:, :, 7] = False
    query = gradients(emulated, operands(), mask)[0]
    assert not query[:, :, 7].any()
    assert query[:, :, 8].any()


# --------------------------------------------------------------------------------------------------
# Determinism, barriers, work


@pytest.mark.parametrize("kind", ["plain", "bias", "dropout"])
def test_every_schedule_gives_the_same_bits(emulator, emulated, kind):
    tensors = operands(batch=40)
    mask = torch.randn(1, 2, 49, 49) if kind == "bias" else None
    seed, options = (torch.tensor([5]), Options(0.3, 20, 5, 0.3)) if kind == "dropout" else (None, PLAIN)
    results = []
    for schedule in range(4):
        emulator.configure(seed=schedule)
        grads = gradients(emulated, tensors, mask, seed, options)
        results.append(torch.cat([t.float().flatten() for t in grads]))
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("kind", ["plain", "bias"])
def test_no_barrier_and_no_wait_can_be_left_out(emulator, emulated, kind):
    """With a bias, blocks take several heads."""
    tensors = operands(batch=40, heads=1, queries=33, keys=33, dims=(8, 8)) if kind == "bias" else operands(1, 1)
    mask = torch.randn(1, 1, 33, 33) if kind == "bias" else None
    emulator.configure()
    call = backward(emulated, tensors, mask)
    call()
    pattern = rf"(sync_block|async_copy_wait) csrc/attention/\S+ in {KERNEL}"
    sites = [site for site in emulator.sites() if re.match(pattern, site)]
    assert len(sites) == (6 if kind == "bias" else 4)
    for site in sites:
        emulator.configure(leave_out=site)
        with pytest.raises(RuntimeError, match="emulator: "):
            call()


def work(emulator, call):
    before = emulator.statistics().get(KERNEL, {})
    call()
    return {name: count - before.get(name, 0) for name, count in emulator.statistics()[KERNEL].items()}


@pytest.mark.parametrize("dims", [(32, 32), (64, 64)], ids=str)
@pytest.mark.parametrize("mask", [None, (1, 2, 64, 64)], ids=["plain", "bias"])
def test_five_products_and_every_operand_read_once(emulator, emulated, dims, mask):
    tensors = operands(queries=64, keys=64, dims=dims)
    bias = mask if mask is None else torch.randn(mask)
    done = work(emulator, lambda: gradients(emulated, tensors, bias))
    heads, product = 4, 64 // 16 * (64 // 8) * (dims[0] // 16)
    assert done["matrix_products"] == heads * 5 * product
    assert done["async_copies"] == heads * 4 * 64 * dims[0] * 2 // 16 // 32
    assert done["bank_conflicts"] == 0


def test_what_a_mask_rules_out_is_not_computed(emulator, emulated):
    """32 keys of 64 are left."""
    tensors, mask = operands(queries=64, keys=64), torch.zeros(1, 1, 1, 64, dtype=torch.bool)
    mask[..., :32] = True
    full = work(emulator, lambda: gradients(emulated, tensors, torch.ones_like(mask)))["matrix_products"]
    left = work(emulator, lambda: gradients(emulated, tensors, mask))["matrix_products"]
    assert left == full / 2


# --------------------------------------------------------------------------------------------------
# Which problems take it


@needs_module
def test_named_windows_take_it():
    for name, shape in ATTENTION_SHAPES.items():
        sizes = (shape.batch, shape.heads, shape.heads, shape.queries, shape.keys, shape.key_dim, shape.value_dim)
        assert ("one tile" in plan(*sizes)) == (name in ("swin-window", "seq2seq"))
    swin = plan(2048, 4, 4, 49, 49, 32, 32, plain=False, mask=(1, 4, 49, 49))["one tile mask"]
    assert (swin["blocks"], swin["block_m"], swin["block_n"], swin["warps"]) == (4, 64, 64, 4)
    # As many blocks as run at the same time, so that there are few partial sums.
    assert swin["blocks"] * swin["slices"] == 2 * 132


@needs_module
def test_what_it_leaves_to_the_other_kernels():
    assert "one tile" in plan(2, 4, 4, 64, 64, 64, 64)
    for other in [
        plan(2, 4, 2, 64, 64, 64, 64),
        plan(2, 4, 4, 97, 64, 64, 64),
        plan(2, 4, 4, 64, 97, 64, 64),
        plan(2, 4, 4, 64, 65, 128, 128),
        plan(2, 4, 4, 64, 64, 136, 64),
        plan(2, 4, 4, 64, 64, 72, 72, element_size=4),
        plan(2, 4, 4, 65, 64, 32, 32, element_size=4),
    ]:
        assert "one tile" not in other
    for mask in [(1, 1, 1, 64), (1, 4, 64, 1), (1, 1, 1, 1)]:
        assert "one tile mask" not in plan(2, 4, 4, 64, 64, 64, 64, plain=False, mask=mask)


def test_a_softcap_and_grouped_heads_take_the_other_kernels(emulator, emulated):
    grouped = operands(heads=4)[:1] + operands(heads=2)[1:]
    for tensors, options in ((operands(), PLAIN._replace(softcap=0.7)), (grouped, PLAIN)):
        found = launches(emulator, lambda: gradients(emulated, tensors, None, None, options))  # noqa: B023
        assert KERNEL not in found
        assert found.keys() >= set(GENERAL)


def test_no_keys_and_no_heads(emulated):
    for batch, keys in ((2, 0), (0, 49)):
        grads = gradients(emulated, operands(batch=batch, keys=keys))
        assert not any(grad.any() for grad in grads)
