"""The CUDA kernels of attention's tangent and second order, run on the host: determinism, barriers, plans, layouts,
tiles that are skipped, tangents that are absent, what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastgen
from benchmarks.shapes import ATTENTION_SHAPES
from fastgen import backend
from fastgen.backend import libraries, selection
from fastgen.functional import scaled_dot_product_attention as attention
from fastgen.ops.attention.problem import WIDEST_HEAD
from fastgen.testing import largest_error
from tests.emulator import build
from tests.ops.attention_cases import (
    DIMS,
    DROPOUT,
    DTYPES,
    HEADS,
    LAYOUTS,
    MASKS,
    SOFTCAPS,
    Case,
    check_second_order,
    matrix,
)
from tests.ops.test_attention_kernels import (
    KEPT,
    OPTIONS,
    PLAIN,
    assert_no_site_can_be_left_out,
    emulated,  # noqa: F401  (a fixture)
    needs_module,
    operands,
    plan,
)

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

KERNELS = ("attention_tangent", "attention_second_order_query", "attention_second_order_key_value")


def second_passes(operators, tensors, mask=None, seed=None, options=PLAIN, absent=()):
    """Calls of the two operators, by name; tangents and gradients are made from the tensors."""
    out, lse = operators.attention_forward(*tensors, mask, seed, None, *options)
    learned = mask is not None and mask.is_floating_point()
    directions = [t.flip(-2) for t in tensors] + [mask.flip(-1) if learned else None]
    directions = [None if i in absent else t for i, t in enumerate(directions)]
    upstream = torch.ones_like(out), torch.ones_like(lse)
    rest = (*tensors, out, lse, mask, seed, None, *directions, *options)
    return {
        "attention_tangent": lambda: operators.attention_tangent(*rest),
        "attention_second_order": lambda: operators.attention_second_order(*upstream, *rest, learned),
    }


def second_order(*arguments, **options):
    """What the two operators give."""
    return [result for call in second_passes(*arguments, **options).values() for result in call()]


# --------------------------------------------------------------------------------------------------
# Any problem, under any schedule


@st.composite
def cases(draw, longest):
    """Of 16 bits and up to 64 dims, lengths up to ``longest``."""
    dtype, dims = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([d for d in DIMS if max(d) <= 136]))
    most = longest if dtype != torch.float32 and max(dims) <= 64 else 40
    lengths = st.integers(1, most)
    rest = [draw(st.sampled_from(axis)) for axis in (MASKS, DROPOUT, HEADS, LAYOUTS)]
    batch, softcap = 1 if rest[2][0] > 2 else draw(st.integers(1, 2)), draw(st.sampled_from(SOFTCAPS))
    return Case(dtype, dims, draw(lengths), draw(lengths), *rest, batch=batch, softcap=softcap)


def property_holds(emulator, case, schedule):
    emulator.configure(seed=schedule)
    with fastgen.use_backend("emulated"):
        check_second_order(case, torch.device("cpu"), schedule % 1000)


ANY = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@settings(max_examples=12, **ANY)
@given(case=cases(70), schedule=st.integers(0, 2**32 - 1))
def test_any_problem_under_any_schedule(emulated, emulator, case, schedule):  # noqa: F811
    property_holds(emulator, case, schedule)


@pytest.mark.slow
@settings(max_examples=1000, **{**ANY, "derandomize": False})
@given(case=cases(100), schedule=st.integers(0, 2**32 - 1))
def test_very_many_problems_under_any_schedule(emulated, emulator, case, schedule):  # noqa: F811
    property_holds(emulator, case, schedule)


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "window and dropout", "softcap"])
def test_every_schedule_gives_the_same_bits(emulator, emulated, options):  # noqa: F811
    tensors, mask = operands(), torch.randn(1, 1, 1, 90)
    seed = torch.tensor([5]) if options.dropout_p else None
    results = []
    for schedule in range(3):
        emulator.configure(seed=schedule)
        results.append(torch.cat([t.float().flatten() for t in second_order(emulated, tensors, mask, seed, options)]))
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize(
    ("dims", "dtype"), [((24, 40), torch.bfloat16), ((200, 256), torch.float32)], ids=["two stages", "one stage"]
)
@pytest.mark.parametrize("kernel", ["attention_tangent", "attention_second_order"])
def test_no_barrier_and_no_wait_can_be_left_out(emulator, emulated, dims, dtype, kernel):  # noqa: F811
    tensors = operands(heads=1, queries=20, keys=40 if dtype == torch.float32 else 70, dims=dims, dtype=dtype)
    seeds = 2 if dtype == torch.bfloat16 else 1
    assert_no_site_can_be_left_out(emulator, second_passes(emulated, tensors)[kernel], kernel, seeds)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 20), (1, 1, 17, 1)], ids=["per key", "per row"])
def test_no_barrier_of_the_mask_gradient_can_be_left_out(emulator, emulated, sizes):  # noqa: F811
    """More heads than blocks on the emulator's GPU, so that a block takes two."""
    tensors, mask = operands(batch=49, heads=1, queries=17, keys=20, dims=(8, 8)), torch.ones(sizes)
    call = second_passes(emulated, tensors, mask)["attention_second_order"]
    assert_no_site_can_be_left_out(emulator, call, "attention_mask_second_order", seeds=1)


# --------------------------------------------------------------------------------------------------
# The schedule


@needs_module
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("name", ATTENTION_SHAPES)
def test_every_named_shape_has_a_plan_for_every_gpu(name, element_size):
    shape = ATTENTION_SHAPES[name]
    mask = (1, 1, shape.queries, shape.keys)
    plans = plan(shape, element_size=element_size, plain=False, mask=mask, shared_limit=99 * 1024)
    for kernel in ("tangent", "second order query", "second order key_value", "second order mask"):
        chosen = plans[kernel]
        assert chosen["tile"][0] >= shape.key_dim, kernel
        assert chosen["tile"][1] >= shape.value_dim, kernel
        assert chosen["shared_bytes"] <= 99 * 1024, kernel


@needs_module
def test_small_heads_have_a_tile_of_their_own():
    tiles = backend.plans.attention_tiles(second_order=True)
    assert plan(ATTENTION_SHAPES["sagan-64"])["tangent"]["tile"] == (16, 32)
    assert max(tiles) == (WIDEST_HEAD, WIDEST_HEAD)


@pytest.mark.parametrize("kind", KEPT)
def test_tiles_that_a_mask_rules_out_are_not_computed(emulator, emulated, kind):  # noqa: F811
    options, mask, products, copies = KEPT[kind]
    mask = mask if mask is None else mask.clone()  # now memory that the emulator knows
    tensors = operands(heads=1, queries=256, keys=256, dims=(8, 8))
    kept = mask if mask is None or mask.dtype == torch.bool else mask.isfinite()

    def work(mask, options):
        before = emulator.statistics()
        second_order(emulated, tensors, mask, None, options)
        after = emulator.statistics()
        return [
            sum(after[name][what] - before.get(name, {what: 0})[what] for name in KERNELS)
            for what in ("matrix_products", "async_copies")
        ]

    full, left = work(None, PLAIN), work(kept, options)
    assert 0 < left[0] <= products * full[0]
    assert 0 < left[1] <= copies * full[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(8, 32), (64, 64), (32, 128), (72, 72), (256, 256)], ids=str)
def test_the_tangent_has_no_bank_conflicts(emulator, emulated, dims, dtype):  # noqa: F811
    conflicts = lambda: emulator.statistics().get("attention_tangent", {"bank_conflicts": 0})["bank_conflicts"]  # noqa: E731
    before = conflicts()
    second_order(emulated, operands(heads=1, queries=40, keys=50, dims=dims, dtype=dtype))
    assert conflicts() == before


def test_an_absent_tangent_costs_nothing_and_means_zero(emulator, emulated):  # noqa: F811
    tensors, mask = operands(heads=1, queries=40, keys=50), torch.randn(1, 1, 40, 50)

    def run(absent):
        before = emulator.statistics()
        results = second_order(emulated, tensors, mask, absent=absent)
        after = emulator.statistics()
        return results, sum(
            after[name]["matrix_products"] - before.get(name, {"matrix_products": 0})["matrix_products"]
            for name in KERNELS
        )

    full = run(())[1]
    for absent in ((0,), (1,), (2,), (3,), (0, 1), (0, 1, 3), (2, 3), (0, 1, 2), (0, 1, 2, 3)):
        ours, products = run(absent)
        exact = second_order(torch.ops.fastgen_torch, [t.double() for t in tensors], mask.double(), absent=absent)
        for a, b in zip(ours, exact, strict=True):
            assert largest_error(a, b) <= 2e-2 * max(1.0, float(b.abs().max()))
        assert products == full if absent == (3,) else products < full


# --------------------------------------------------------------------------------------------------
# Layout, precision, refusals


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", [(16, 24), (5, 3)], ids=str)
def test_results_lie_as_the_fake_promises(emulated, layout, dims):  # noqa: F811
    tensors = [matrix(layout, 2, 3, n, d, torch.float16) for n, d in ((7, dims[0]), (9, dims[0]), (9, dims[1]))]
    mask = torch.randn(1, 3, 1, 9).half()
    got = second_order(emulated, tensors, mask)
    for a, b in zip(got, second_order(torch.ops.fastgen_torch, tensors, mask), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
    promised = second_order(torch.ops.fastgen, [t.to("meta") for t in tensors], mask.to("meta"))
    assert got[0].stride() == promised[0].stride()


def test_tf32_is_taken_only_where_it_is_allowed(emulated):  # noqa: F811
    tensors = operands(queries=33, keys=40, dtype=torch.float32)
    exact = second_order(torch.ops.fastgen_torch, [t.double() for t in tensors])
    errors = []
    for allowed in (False, True):
        ours = second_order(emulated, tensors, options=PLAIN._replace(allow_tf32=allowed))
        errors.append(
            max(largest_error(a, b) / float(b.abs().max()) for a, b in zip(ours, exact, strict=True) if b.numel())
        )
    assert errors[0] < 5e-6 < 5e-5 < errors[1] < 5e-2


def test_bad_operands_are_refused_by_name(emulated):  # noqa: F811
    query, key, value = operands()
    out, lse = emulated.attention_forward(query, key, value, None, None, None, *PLAIN)
    wide = [torch.zeros(1, 2, 70, 600).to(query)] * 3
    for tensors, directions, text in [
        ((query, key, value, out), (query[:, :1], None, None, None), "tangent_query: expected the shape of what it is"),
        ((query, key, value, out), (None, key.float(), None, None), "tangent_key: expected the dtype of query"),
        ((query, key, value, out), (None, None, key, None), "tangent_value: expected the shape of what it is"),
        ((query, key, value, out), (None, None, None, torch.ones(1, 1, 1, 90) > 0), "tangent_mask: expected a float"),
        ((query, key, value, out), (None, None, None, torch.ones(1, 1, 1, 91)), "tangent_mask: expected dim 3 to be 1"),
        ((query, key, value, query), (None,) * 4, "out: expected the dims of query, and value's last"),
        ((*wide, wide[0]), (None,) * 4, "head dims up to 512 and 512, got 600 and 600"),
    ]:
        rest = (lse, None, None, None, *directions, *PLAIN)
        with pytest.raises(RuntimeError, match=text):
            emulated.attention_tangent(*tensors, *rest)
        with pytest.raises(RuntimeError, match=text):
            emulated.attention_second_order(tensors[3], None, *tensors, *rest, False)


def test_heads_too_wide_for_these_kernels_take_pytorch_or_raise(monkeypatch):
    """As on a GPU: where there is a kernel, but not for these heads."""
    tensors = [torch.randn(1, 1, 4, 600) for _ in range(3)]
    monkeypatch.setattr(selection, "_place", lambda *arguments: (backend.COMPILED, None))
    has_kernel = libraries.has_kernel
    names = ("attention_tangent", "attention_second_order")
    monkeypatch.setattr(libraries, "has_kernel", lambda name, device: name in names or has_kernel(name, device))
    directions = tuple(t.flip(-1) for t in tensors)
    with fastgen.use_backend("compiled"), pytest.raises(RuntimeError, match="head dims up to 512, not for 600 and 600"):
        torch.func.jvp(attention, tuple(tensors), directions)
    formula = torch.nn.functional.scaled_dot_product_attention
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = torch.func.jvp(formula, tuple(tensors), directions)[1]
    assert largest_error(torch.func.jvp(attention, tuple(tensors), directions)[1], wanted) < 1e-5


def test_nothing_of_the_size_of_the_scores_is_allocated(emulator, emulated):  # noqa: F811
    """On PyTorch's own allocator, which its profiler watches and the emulator's checks do not know."""
    build.track_tensors(False)
    emulator.configure(checks=False)
    length = 512
    tensors, mask = operands(heads=1, queries=length, keys=length, dims=(8, 8)), torch.randn(1, 1, 1, length)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        second_order(emulated, tensors, mask)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < length * length
