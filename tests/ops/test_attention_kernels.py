"""The CUDA kernels of attention, run on the host: schedule, determinism, barriers, layouts, what they refuse."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastgen
from benchmarks import roofline
from benchmarks.shapes import ATTENTION_SHAPES
from fastgen import backend
from fastgen.backend import selection
from fastgen.cli import main
from fastgen.functional import scaled_dot_product_attention as attention
from fastgen.ops.attention.problem import WIDEST_HEAD, Options
from fastgen.testing import largest_error
from tests.emulator import build
from tests.emulator.build import ROOT
from tests.ops.attention_cases import DIMS, DROPOUT, DTYPES, HEADS, LAYOUTS, MASKS, SOFTCAPS, Case, check, matrix

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

PLAIN = Options(0.0, -1, -1, 0.3)
SHARED_LIMITS = sorted(set(backend.plans.SHARED_LIMITS.values()))
OPTIONS = [PLAIN, Options(0.3, 20, 5, 0.3), PLAIN._replace(softcap=0.7)]


@pytest.fixture
def emulated(emulator):
    build.register()
    return torch.ops.fastgen_emulated


def operands(batch=1, heads=2, queries=70, keys=90, dims=(24, 40), dtype=torch.bfloat16):
    shapes = ((heads, queries, dims[0]), (heads, keys, dims[0]), (heads, keys, dims[1]))
    return [torch.randn(batch, *shape).to(dtype) for shape in shapes]


def passes(emulated, tensors, mask=None, seed=None, options=PLAIN):
    """Calls of the two operators. The forward pass has run before the backward pass is called."""
    forward = lambda: emulated.attention_forward(*tensors, mask, seed, None, *options)  # noqa: E731
    out, lse = forward()
    learned = mask is not None and mask.is_floating_point()
    upstream = torch.ones_like(out), torch.ones_like(lse)
    return forward, lambda: emulated.attention_backward(
        *upstream, *tensors, out, lse, mask, seed, None, *options, learned
    )


def gradients(emulated, tensors, mask=None, seed=None, options=PLAIN):
    """Everything that the two operators give."""
    return [result for call in passes(emulated, tensors, mask, seed, options) for result in call()]


# --------------------------------------------------------------------------------------------------
# Any problem, under any schedule


@st.composite
def cases(draw, longest):
    """Of 16 bits and up to 64 dims, lengths up to ``longest``."""
    dtype, dims = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([d for d in DIMS if max(d) <= 136]))
    most = longest if dtype != torch.float32 and max(dims) <= 64 else 70
    lengths = st.integers(1, most)
    choices = (MASKS, DROPOUT, HEADS, LAYOUTS)
    rest = [draw(st.sampled_from(axis)) for axis in choices]
    batch, softcap = 1 if rest[2][0] > 2 else draw(st.integers(1, 2)), draw(st.sampled_from(SOFTCAPS))
    return Case(dtype, dims, draw(lengths), draw(lengths), *rest, batch=batch, softcap=softcap)


def property_holds(emulator, case, schedule):
    emulator.configure(seed=schedule, shared_limit=SHARED_LIMITS[schedule % len(SHARED_LIMITS)])
    with fastgen.use_backend("emulated"):
        check(case, torch.device("cpu"), schedule % 1000)


ANY = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@settings(max_examples=40, **ANY)
@given(case=cases(130), schedule=st.integers(0, 2**32 - 1))
def test_any_problem_under_any_schedule(emulated, emulator, case, schedule):
    property_holds(emulator, case, schedule)


@pytest.mark.slow
@settings(max_examples=2000, **{**ANY, "derandomize": False})
@given(case=cases(150), schedule=st.integers(0, 2**32 - 1))
def test_very_many_problems_under_any_schedule(emulated, emulator, case, schedule):
    property_holds(emulator, case, schedule)


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "window and dropout", "softcap"])
def test_every_schedule_gives_the_same_bits(emulator, emulated, options):
    """So nothing needs a deterministic mode: sums have one order, also those of a broadcast mask's gradient."""
    tensors, mask = operands(queries=97), torch.randn(1, 1, 1, 90)
    seed = torch.tensor([5]) if options.dropout_p else None
    results = []
    for schedule in range(3):
        emulator.configure(seed=schedule)
        results.append(torch.cat([t.float().flatten() for t in gradients(emulated, tensors, mask, seed, options)]))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def assert_no_site_can_be_left_out(emulator, call, kernel, seeds=2, waits="sync_block|async_copy_wait", **options):
    """``waits``: the functions of the sites; ``options``: of the emulator."""
    emulator.configure(**options)
    call()
    pattern = rf"({waits}) csrc/attention/\S* in {kernel}"
    sites = [site for site in emulator.sites() if re.match(pattern, site)]
    assert len(sites) >= 2
    for site in sites:
        for seed in range(seeds):
            emulator.configure(seed=seed, leave_out=site, **options)
            with pytest.raises(RuntimeError, match="emulator: "):
                call()


@pytest.mark.parametrize("dims", [(24, 40), (200, 256)], ids=["two stages", "one stage"])
def test_no_barrier_and_no_wait_can_be_left_out(emulator, emulated, dims):
    if dims[0] == 24:
        tensors = operands(heads=1, queries=97, dims=dims)
    else:
        tensors = operands(heads=1, queries=20, keys=40, dims=dims, dtype=torch.float32)
    for call in passes(emulated, tensors):
        assert_no_site_can_be_left_out(emulator, call, "attention_")


@pytest.mark.parametrize(
    ("dims", "sizes"),
    [((8, 8), (1, 1, 1, 20)), ((8, 128), (1, 1, 17, 1))],
    ids=["two stages, per key", "one stage, per row"],
)
def test_no_barrier_of_the_mask_gradient_can_be_left_out(emulator, emulated, dims, sizes):
    """More heads than blocks on the emulator's GPU, so that a block takes two."""
    tensors = operands(batch=49, heads=1, queries=17, keys=20, dims=dims)
    _, call = passes(emulated, tensors, torch.ones(sizes))
    assert_no_site_can_be_left_out(emulator, call, "attention_mask_gradient", seeds=1)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 1, 17, 20), (1, 4, 17, 20)], ids=str)
def test_the_threads_that_add_the_parts_of_a_mask_gradient_wait_for_each_other(emulator, emulated, sizes):
    """8 threads for one element, 8 and 2 for each of many. With a softcap: else one kernel has fewer parts."""
    tensors, mask = operands(batch=16, heads=4, queries=17, keys=20, dims=(8, 8)), torch.randn(sizes)
    options = PLAIN._replace(softcap=20.0)
    call = lambda: gradients(emulated, tensors, mask, options=options)  # noqa: E731
    emulator.configure()
    got = call()[-1]
    exact = gradients(torch.ops.fastgen_torch, [t.double() for t in tensors], mask.double(), options=options)[-1]
    assert largest_error(got, exact) < 0.01 * float(exact.abs().max() + 1)
    sites = [site for site in emulator.sites() if re.match(r"sync_block .* in attention_sum_parts", site)]
    assert len(sites) == 1
    emulator.configure(leave_out=sites[0])
    with pytest.raises(RuntimeError, match="emulator: "):
        call()


# --------------------------------------------------------------------------------------------------
# The schedule


def plan(shape, **kwargs):
    sizes = (shape.batch, shape.heads, shape.heads, shape.queries, shape.keys, shape.key_dim, shape.value_dim)
    return backend.plans.attention_plan(*sizes, **{"element_size": 2, "multiprocessors": 132, **kwargs})


needs_module = pytest.mark.skipif(backend.plans.why_not() is not None, reason="the CPU library is not loaded")


@needs_module
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("name", ATTENTION_SHAPES)
@pytest.mark.parametrize("limit", SHARED_LIMITS)
def test_every_named_shape_has_a_plan_for_every_gpu(name, element_size, limit):
    shape = ATTENTION_SHAPES[name]
    for kernel, chosen in plan(shape, element_size=element_size, shared_limit=limit).items():
        key_dim, value_dim = chosen["tile"]
        assert key_dim >= shape.key_dim, kernel
        assert value_dim >= shape.value_dim, kernel
        assert chosen["shared_bytes"] <= limit, kernel
        owns_keys = "key_value" in kernel or kernel == "one head"
        rows, owned = (shape.keys, chosen["block_n"]) if owns_keys else (shape.queries, chosen["block_m"])
        heads = shape.batch * shape.heads
        covered = chosen["blocks"] * chosen["tiles_per_block"] * owned
        assert covered >= rows * heads, kernel
        if kernel.endswith("sm90"):  # a persistent grid
            assert chosen["blocks"] <= 132
            continue
        assert covered < (rows + owned) * heads + chosen["tiles_per_block"] * owned, kernel


@needs_module
def test_small_heads_have_tiles_of_their_own_and_the_rest_takes_the_next_larger():
    tiles = backend.plans.attention_tiles()
    assert {(16, 32), (32, 32), (64, 64)} <= set(tiles)
    assert max(tiles) == (WIDEST_HEAD, WIDEST_HEAD)
    shape = ATTENTION_SHAPES["dit-xl"]
    assert plan(shape)["forward"]["tile"] == min(t for t in tiles if t[0] >= 72 and t[1] >= 72)


@needs_module
def test_short_rows_share_a_block_and_few_rows_take_fewer_warps():
    swin, decode = plan(ATTENTION_SHAPES["swin-window"])["forward"], plan(ATTENTION_SHAPES["decode"])["forward"]
    assert swin["tiles_per_block"] > 1
    assert decode["warps"] == 1


@needs_module
def test_info_shows_the_plan_of_any_shape():
    found = fastgen.info((64, 1, 1024, 1024, 8, 32), torch.float16)
    second = {"tangent", "second order query", "second order key_value"}
    assert set(found.plans) == {f"attention {name}" for name in {"forward", "query", "key_value"} | second}
    assert "attention forward: tile (16, 32)" in str(found)
    for sizes, dtype, text in [
        ((64, 1), torch.half, "attention: expected six positive integers"),
        ((1, 1, 0, 4, 8, 8), torch.half, "attention: expected six positive integers"),
        ((1, 1, 4, 4, 8, 600), torch.half, "attention: expected head dims up to 512, got 8 and 600"),
        ((1, 1, 4, 4, 8, 8), torch.float64, "dtype: expected one of torch.float32"),
    ]:
        with pytest.raises(ValueError, match=text):
            fastgen.info(sizes, dtype)


@needs_module
def test_the_command_shows_it_too(capsys):
    assert main(["info", "--attention", "1,16,16384,16384,128,128", "--dtype", "float16"]) == 0
    assert "attention key_value: tile (128, 128)" in capsys.readouterr().out
    for words, complaint in [
        (["--attention", "1,16,x"], "--attention: expected B,H,N,M,Dk,Dv, got 1,16,x"),
        (["--attention", "1,16"], "attention: expected six positive integers"),
        (["--dtype", "float64"], "float64"),
    ]:
        assert main(["info", *words]) == 2
        assert complaint in capsys.readouterr().err


@needs_module
def test_the_mask_gradient_is_split_only_where_its_tiles_are_few():
    shape = ATTENTION_SHAPES["swin-window"]
    shared = plan(shape, plain=False, mask=(1, 4, 49, 49))["mask"]
    own = plan(shape, plain=False, mask=(2048, 4, 49, 49))["mask"]
    assert shared["blocks"] == 4
    assert shared["slices"] > 100
    assert (own["blocks"], own["slices"]) == (4 * 2048, 1)


@needs_module
def test_the_roofline_table_is_what_its_program_writes():
    assert (ROOT / "benchmarks" / "roofline.md").read_text() == "\n".join(roofline.lines()) + "\n"


def test_a_block_that_takes_several_windows_gives_what_one_each_gives(emulator, emulated):
    """The emulator's GPU has few multiprocessors, so that this many windows are more than it has room for."""
    tensors = operands(batch=150, heads=3, queries=9, keys=11, dims=(8, 8), dtype=torch.float16)
    bias = torch.randn(1, 3, 9, 11).half()
    before = emulator.statistics().get("attention_forward", {"blocks": 0})["blocks"]
    out, lse = emulated.attention_forward(*tensors, bias, None, None, *PLAIN)
    assert emulator.statistics()["attention_forward"]["blocks"] - before < 150 * 3 / 2
    alone = [
        emulated.attention_forward(*(t[i : i + 1] for t in tensors), bias, None, None, *PLAIN) for i in (0, 77, 149)
    ]
    for i, (a, b) in zip((0, 77, 149), alone, strict=True):
        assert torch.equal(out[i], a[0])
        assert torch.equal(lse[i], b[0])


PADDED = torch.arange(256).reshape(1, 1, 1, 256) >= 70
KEPT = {
    # What is left of 256 x 256 scores, in tiles of 64 keys and warps of 16 or 32 rows: matrix products, copies.
    "causal": (Options(0.0, -1, 0, 0.3), None, 0.70, 0.85),
    "window": (Options(0.0, 16, 16, 0.3), None, 0.50, 0.75),
    "padding": (PLAIN, ~PADDED, 0.51, 0.75),
    "padding by a float mask": (
        PLAIN,
        torch.zeros(PADDED.shape).masked_fill(PADDED, -math.inf),
        0.51,
        0.75,
    ),
    "boolean blocks": (
        PLAIN,
        torch.eye(4).bool().repeat_interleave(64, 0).repeat_interleave(64, 1)[None, None],
        0.26,
        1.0,
    ),
}


@pytest.mark.parametrize("kind", KEPT)
def test_tiles_that_a_mask_rules_out_are_not_computed(emulator, emulated, kind):
    options, mask, products, copies = KEPT[kind]
    mask = mask if mask is None else mask.clone()  # now memory that the emulator knows
    tensors = operands(heads=1, queries=256, keys=256, dims=(64, 64))

    def work(mask, options):
        before = emulator.statistics()
        gradients(emulated, tensors, mask, None, options)
        after = emulator.statistics()
        names = ("attention_forward", "attention_backward_query", "attention_backward_key_value")
        return [
            sum(after[n][what] - before.get(n, {what: 0})[what] for n in names)
            for what in ("matrix_products", "async_copies")
        ]

    full, left = work(None, PLAIN), work(mask, options)
    assert 0 < left[0] <= products * full[0]
    assert 0 < left[1] <= copies * full[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(8, 8), (32, 32), (72, 72), (32, 128), (256, 256)], ids=str)
def test_forward_has_no_bank_conflicts(emulator, emulated, dims, dtype):
    conflicts = lambda: emulator.statistics().get("attention_forward", {"bank_conflicts": 0})["bank_conflicts"]  # noqa: E731
    before = conflicts()
    emulated.attention_forward(*operands(heads=1, dims=dims, dtype=dtype), None, None, None, *PLAIN)
    assert conflicts() == before


# --------------------------------------------------------------------------------------------------
# Layout, precision, refusals


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", [(16, 24), (5, 3)], ids=str)
def test_results_lie_as_the_fake_promises(emulated, layout, dims):
    tensors = [matrix(layout, 2, 3, n, d, torch.float16) for n, d in ((7, dims[0]), (9, dims[0]), (9, dims[1]))]
    mask = torch.randn(1, 3, 1, 9).half()
    fakes = [t.to("meta") for t in (*tensors, mask)]
    promised = torch.ops.fastgen.attention_forward(*fakes, None, None, *PLAIN)
    got = gradients(emulated, tensors, mask)
    assert [t.stride() for t in got[:1]] == [t.stride() for t in promised[:1]]
    wanted = gradients(torch.ops.fastgen_torch, tensors, mask)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()


def test_tf32_is_taken_only_where_it_is_allowed(emulator, emulated):
    tensors = operands(dtype=torch.float32)
    exact = gradients(torch.ops.fastgen_torch, [t.double() for t in tensors])
    errors = []
    for allowed in (False, True):
        launched = emulator.statistics().get("attention_forward", {"matrix_products": 0})["matrix_products"]
        out = emulated.attention_forward(*tensors, None, None, None, *PLAIN._replace(allow_tf32=allowed))[0]
        products = emulator.statistics()["attention_forward"]["matrix_products"] - launched
        errors.append((largest_error(out, exact[0]), products))
    (fine, three), (coarse, one) = errors
    assert fine < 2e-6 < 1e-4 < coarse < 1e-2
    assert three == 3 * one


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_mask_of_another_dtype_gets_its_gradient_in_that(emulated, dtype):
    tensors, mask = operands(), torch.randn(1, 2, 70, 1).to(dtype)
    got = gradients(emulated, tensors, mask)[-1]
    exact = gradients(torch.ops.fastgen_torch, [t.double() for t in tensors], mask.double())[-1]
    assert got.dtype == dtype
    assert largest_error(got, exact) < 0.02


def test_bad_operands_are_refused_by_name(emulated):
    query, key, value = operands()
    wide = [torch.zeros(1, 1, 4, 600, dtype=torch.half)] * 3
    for arguments, text in [
        ((query, key.float(), value, None, None), "key: expected the dtype of query"),
        ((query, key, value.mT, None, None), "value: expected four dims, the last of them contiguous"),
        ((query, key, value[:, :, :5], None, None), "key, value: expected shapes that fit the query"),
        ((query, key, value, torch.ones(1, 1, 70, 91), None), "mask: expected dim 3 to be 1 or 90, got 91"),
        ((query, key, value, torch.ones(1, 1, 70, 90, dtype=torch.int), None), "mask: expected bool, float64"),
        ((query, key, value, None, torch.tensor([1, 2])), "seed: expected a number of seeds that divides the batch, 1"),
        ((*wide, None, None), "head dims up to 512 and 512, got 600 and 600"),
        ((query.double(), key, value, None, None), "query: expected float32, float16 or bfloat16"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            emulated.attention_forward(*arguments, None, *PLAIN)


def test_heads_too_wide_for_a_kernel_take_pytorch_or_raise(monkeypatch):
    """As on a GPU: where there is a kernel, but not for these heads."""
    tensors = [torch.randn(1, 1, 4, 600) for _ in range(3)]
    monkeypatch.setattr(selection, "_place", lambda *arguments: (backend.COMPILED, None))
    with fastgen.use_backend("compiled"), pytest.raises(RuntimeError, match="head dims up to 512, not for 600 and 600"):
        attention(*tensors)
    assert largest_error(attention(*tensors), torch.nn.functional.scaled_dot_product_attention(*tensors)) < 1e-5


def test_nothing_of_the_size_of_the_scores_is_allocated(emulator, emulated):
    """On PyTorch's own allocator, which its profiler watches and the emulator's checks do not know."""
    build.track_tensors(False)
    emulator.configure(checks=False)
    length = 512
    tensors = operands(heads=1, queries=length, keys=length, dims=(8, 8))
    mask = torch.randn(1, 1, 1, length)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        got = gradients(emulated, tensors, mask)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < length * length
    assert math.isfinite(float(got[-1].sum()))
