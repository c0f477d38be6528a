"""The attention kernels for sm_90a, run on the host: what they serve, accuracy, schedules, synchronization."""

from __future__ import annotations

import math
import re
import zlib

import pytest
import torch

from fastgen import backend, environment
from fastgen.testing import assert_accurate
from tests.covering import covering
from tests.emulator import build
from tests.ops.attention_cases import HEADS, LAYOUTS, Case, problem_of
from tests.ops.hopper_cases import (
    DTYPES,
    HOPPER,
    MASKS,
    assert_info_says,
    emulated_hopper,
    launches_of,
    shapes_of,
)
from tests.ops.test_attention_kernels import PLAIN, assert_no_site_can_be_left_out, needs_module, plan

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

KERNEL = "attention_forward_sm90"
AXES = [
    [(64, 64), (40, 64), (72, 72), (128, 96), (128, 128), (192, 136), (208, 256)],
    (17, 64, 128, 203, 257),
    (3, 64, 129, 257, 600),
    MASKS,
    DTYPES,
    HEADS,
    LAYOUTS,
]
CASES = [
    Case(dtype, dims, queries, keys, mask, heads=heads, layout=layout, batch=1 + (keys < 129))
    for dims, queries, keys, mask, dtype, heads, layout in covering(AXES, lambda point: True)
]


@pytest.fixture
def emulated(emulator, monkeypatch):
    return emulated_hopper(emulator, monkeypatch)


def launches(emulator):
    return launches_of(emulator, KERNEL)[0]


def operands(heads=2, queries=200, keys=300, dims=(64, 64), dtype=torch.bfloat16):
    return [torch.randn(1, *shape).to(dtype) for shape in shapes_of(heads, queries, keys, dims)]


# --------------------------------------------------------------------------------------------------
# Results


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_pair_of_settings(case, emulated, emulator):
    seed = zlib.crc32(str(case).encode())
    emulator.configure(seed=seed, **HOPPER)
    problem = problem_of(case, seed)
    before = launches(emulator)
    options = PLAIN._replace(window_left=problem.sides[0], window_right=problem.sides[1], scale=case.dims[0] ** -0.5)
    got = emulated.attention_forward(*problem.leaves, problem.mask, None, None, *options)
    assert launches(emulator) == before + 1, "another kernel served it"
    plain, exact = (
        problem.formula([leaf.to(dtype) for leaf in problem.leaves]) for dtype in (case.dtype, torch.float64)
    )
    for name, ours, a, b in zip(("out", "lse"), got, plain, exact, strict=True):
        hidden = b == -math.inf
        assert torch.equal(ours == -math.inf, hidden), name
        assert_accurate(*(t.masked_fill(hidden, 0) for t in (ours, a, b)), name)


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
def test_any_scale(emulated, scale):
    tensors = operands(queries=70, keys=150)
    got = emulated.attention_forward(*tensors, None, None, None, *PLAIN._replace(scale=scale))
    exact = torch.ops.fastgen_torch.attention_forward(
        *(t.double() for t in tensors), None, None, None, *PLAIN._replace(scale=scale)
    )
    torch.testing.assert_close(got[0].double(), exact[0], rtol=0, atol=0.02)
    torch.testing.assert_close(got[1].double(), exact[1].double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)], ids=str)
def test_keys_and_values_that_no_query_attends_to_may_be_anything(emulated, dims, bad):
    """Behind the last query of a causal mask, and before the window of the first."""
    query, key, value = operands(heads=1, queries=100, keys=400, dims=dims)
    for options, hidden in [
        (PLAIN._replace(window_left=-1, window_right=0), slice(100, None)),
        (PLAIN._replace(window_left=10, window_right=30), slice(130, None)),
    ]:
        got = []
        for filler in (0.0, bad):
            k, v = key.clone(), value.clone()
            k[:, :, hidden], v[:, :, hidden] = filler, filler
            got.append(emulated.attention_forward(query, k, v, None, None, None, *options))
        assert torch.equal(got[0][0], got[1][0])
        assert torch.equal(got[0][1], got[1][1])


def test_the_values_before_every_window_may_be_anything(emulated):
    """The second query tile of a block begins in the middle of a key tile."""
    query, key, value = operands(heads=1, queries=256, keys=256)
    options = PLAIN._replace(window_left=3, window_right=0)
    wanted = emulated.attention_forward(query, key, value, None, None, None, *options)
    key[:, :, :100], value[:, :, :100] = math.nan, math.nan
    got = emulated.attention_forward(query, key, value, None, None, None, *options)
    assert torch.equal(got[0][:, :, 128:], wanted[0][:, :, 128:])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 192), (256, 256)], ids=str)
def test_masked_keys_and_values_may_be_anything(emulated, dims, bad):
    """Single keys, a whole tile of them, and the end of the last tile."""
    query, key, value = operands(queries=140, keys=500, dims=dims)
    mask = torch.rand(2, 1, 500) > 0.3
    mask[:, :, 128:256], mask[:, :, 490:] = False, False
    got = []
    for filler in (0.0, bad):
        k, v = (torch.where(mask.mT, t, torch.tensor(filler).to(t)) for t in (key, value))
        got.append(emulated.attention_forward(query, k, v, mask[None], None, None, *PLAIN._replace(window_right=20)))
    assert torch.equal(got[0][0], got[1][0])
    assert torch.equal(got[0][1], got[1][1])


def test_a_batch_entry_without_unmasked_keys_gives_zero(emulated):
    query, key, value = (torch.cat([t, t, t]) for t in operands(queries=20, keys=140))
    mask = torch.ones(3, 1, 1, 140, dtype=torch.bool)
    mask[1] = False
    out, lse = emulated.attention_forward(query, key, value, mask, None, None, *PLAIN)
    plain, plain_lse = emulated.attention_forward(query[:1], key[:1], value[:1], None, None, None, *PLAIN)
    assert bool((out[1] == 0).all())
    assert bool((lse[1] == -math.inf).all())
    for entry in (0, 2):
        assert torch.equal(out[entry], plain[0])
        assert torch.equal(lse[entry], plain_lse[0])


def test_a_row_without_keys_gives_zero(emulated):
    """Queries far behind the keys: whole tiles have none."""
    tensors = operands(heads=1, queries=300, keys=40)
    out, lse = emulated.attention_forward(*tensors, None, None, None, *PLAIN._replace(window_left=5, window_right=0))
    assert bool((out[:, :, 45:] == 0).all())
    assert bool((lse[:, :, 45:] == -math.inf).all())
    assert bool(lse[:, :, :45].isfinite().all())


# --------------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize(
    ("dims", "queries"),
    [((64, 64), 300), ((64, 64), 200), ((128, 128), 300), ((192, 192), 140), ((256, 256), 140)],
    ids=str,
)
def test_every_schedule_gives_the_same_bits(emulator, emulated, dims, queries):
    """Of more query tiles than there are blocks. 300 queries of three heads have three consumers with head dim 64."""
    keys = 420 if dims[0] <= 128 else 260
    tensors, options = operands(heads=3, queries=queries, keys=keys, dims=dims), PLAIN._replace(window_right=0)
    results = []
    for seed in range(4):
        emulator.configure(seed=seed, **HOPPER)
        results.append(emulated.attention_forward(*tensors, None, None, None, *options))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


SYNCHRONIZING = (
    "sync_block|sync_named|arrive_named|mbarrier_init|mbarrier_wait|mbarrier_arrive|fence_mbarrier_init"
    "|fence_async_proxy|wgmma_fence|wgmma_commit|wgmma_wait"
)


QUERY_WAIT = "mbarrier_wait(&barriers.query_empty"


def site_of(text: str) -> str:
    """The site of a wait in the forward kernel, as a pattern."""
    lines = (build.CSRC / "attention" / "sm90" / "forward.cuh").read_text().splitlines()
    (number,) = [number for number, line in enumerate(lines, 1) if text in line]
    return rf"mbarrier_wait csrc/attention/sm90/forward\.cuh:{number} "


@pytest.mark.parametrize(
    ("dims", "heads", "queries", "keys", "padded"),
    [
        ((64, 64), 4, 200, 330, False),
        ((64, 64), 7, 150, 330, False),  # three consumers
        ((128, 128), 4, 200, 310, False),  # tiles of 160 keys
        ((128, 128), 4, 200, 330, True),
        pytest.param((192, 192), 2, 200, 290, False, marks=pytest.mark.slow),
        pytest.param((256, 256), 2, 200, 250, False, marks=pytest.mark.slow),
        pytest.param((256, 256), 2, 200, 250, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_no_barrier_fence_or_wait_can_be_left_out(emulator, emulated, dims, heads, queries, keys, padded):
    """More key tiles than stages, a last one that is not full, and more query tiles of a block than it has buffers."""
    # With two buffers for queries, keys that wait for a stage wait for the queries before too: see the next test.
    waits = SYNCHRONIZING if dims[0] > 128 else f"(?!{site_of(QUERY_WAIT)})(?:{SYNCHRONIZING})"
    tensors = operands(heads=heads, queries=queries, keys=keys, dims=dims)
    mask = torch.arange(keys)[None, None, None] < keys - 3 if padded else None
    mask = None if mask is None else mask.clone()
    call = lambda: emulated.attention_forward(*tensors, mask, None, None, *PLAIN)  # noqa: E731
    assert_no_site_can_be_left_out(emulator, call, KERNEL, waits=waits, **HOPPER)
    emulator.configure(**HOPPER)
    call()
    assert {site.split()[0] for site in emulator.sites()} == {*SYNCHRONIZING.split("|")}


@pytest.mark.parametrize(("heads", "queries"), [(4, 200), (7, 150)], ids=["two consumers", "three consumers"])
def test_queries_wait_for_their_buffer_where_each_tile_has_few_keys(emulator, emulated, heads, queries):
    tensors = operands(heads=heads, queries=queries, keys=100)
    call = lambda: emulated.attention_forward(*tensors, None, None, None, *PLAIN)  # noqa: E731
    emulator.configure(**HOPPER)
    call()
    (site,) = [site for site in emulator.sites() if re.match(site_of(QUERY_WAIT), site)]
    for seed in range(3):
        emulator.configure(seed=seed, leave_out=site, **HOPPER)
        with pytest.raises(RuntimeError, match="emulator: "):
            call()


def test_tiles_outside_the_window_are_neither_copied_nor_computed(emulator, emulated):
    """Three tiles of 128 queries, and of 128 keys."""
    tensors = operands(heads=1, queries=384, keys=384)

    def work(options, mask=None):
        before = emulator.statistics().get(KERNEL, {"matrix_products": 0, "async_copies": 0})
        emulated.attention_forward(*tensors, mask, None, None, *options)
        return [emulator.statistics()[KERNEL][what] - before[what] for what in ("matrix_products", "async_copies")]

    full, causal = work(PLAIN), work(PLAIN._replace(window_right=0))
    window = work(PLAIN._replace(window_left=100, window_right=0))
    assert causal[0] == full[0] * 6 // 9
    assert window[0] == full[0] * 5 // 9
    assert (full[1], causal[1], window[1]) == (3 + 2 * 9, 3 + 2 * 6, 3 + 2 * 5)
    mask = torch.ones(1, 1, 1, 384, dtype=torch.bool)
    mask[..., 128:256] = False
    assert work(PLAIN, mask) == [full[0] * 6 // 9, 3 + 2 * 6]


# --------------------------------------------------------------------------------------------------
# What they serve

OTHERS = {
    "float32": lambda: (operands(dtype=torch.float32), PLAIN, None),
    "a softcap": lambda: (operands(), PLAIN._replace(softcap=0.7), None),
    "a mask of scores": lambda: (operands(), PLAIN, torch.ones(1, 1, 200, 300, dtype=torch.bool)),
    "a float mask of keys": lambda: (operands(), PLAIN, torch.zeros(1, 1, 1, 300)),
    "narrow heads": lambda: (operands(dims=(32, 64)), PLAIN, None),
    "heads of different width": lambda: (operands(dims=(64, 128)), PLAIN, None),
    "keys much wider than values": lambda: (operands(queries=20, keys=30, dims=(192, 128)), PLAIN, None),
    "wide heads": lambda: (operands(queries=20, keys=30, dims=(264, 264)), PLAIN, None),
    "few queries": lambda: (operands(queries=1), PLAIN, None),
    "expanded keys": lambda: ([t[:, :1].expand(-1, 2, -1, -1) for t in operands()], PLAIN, None),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_problems_take_the_other_kernels(emulator, emulated, what):
    tensors, options, mask = OTHERS[what]()
    before = launches(emulator)
    out, _ = emulated.attention_forward(*tensors, mask, None, None, *options)
    assert launches(emulator) == before
    exact, _ = torch.ops.fastgen_torch.attention_forward(*(t.double() for t in tensors), mask, None, None, *options)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=0.05)


@pytest.mark.parametrize(("given", "limit"), [(None, "sm_90"), ("0", "sm_90"), ("1", "sm_80")])
def test_they_are_taken_on_sm_90_where_they_are_asked_for(emulator, emulated, monkeypatch, given, limit):
    monkeypatch.delenv("FASTGEN_SM90")
    if given is not None:
        monkeypatch.setenv("FASTGEN_SM90", given)
    emulator.configure(shared_limit=backend.plans.SHARED_LIMITS[limit])
    before = launches(emulator)
    emulated.attention_forward(*operands(heads=1, queries=20, keys=20), None, None, None, *PLAIN)
    assert launches(emulator) == before


@needs_module
def test_the_plan_says_what_they_serve():
    from benchmarks.shapes import ATTENTION_SHAPES

    chosen = plan(ATTENTION_SHAPES["long"])["forward sm90"]
    assert chosen == {
        "tile": (128, 128), "warps": 12, "block_m": 128, "block_n": 160, "tiles_per_block": 16, "blocks": 132,
        "slices": 1, "shared_bytes": (2 * 128 + 2 * 2 * 160) * 256, "stages": 2,
    }  # fmt: skip
    assert "forward sm90" not in plan(ATTENTION_SHAPES["long"], shared_limit=backend.plans.SHARED_LIMITS["sm_80"])
    assert "forward sm90" not in plan(ATTENTION_SHAPES["long"], element_size=4)
    assert "forward sm90" not in plan(ATTENTION_SHAPES["long"], plain=False)
    served = {name for name, shape in ATTENTION_SHAPES.items() if "forward sm90" in plan(shape)}
    assert {"transgan-window", "dit-xl", "image-lm", "long"} <= served
    assert not {"sagan-64", "sagan-256", "swin-window", "vae-mid"} & served


@needs_module
@pytest.mark.parametrize(
    ("dim", "queries", "rows", "keys"),
    [
        (64, 128, 128, 128), (64, 192, 192, 128), (64, 4096, 192, 128), (128, 4096, 128, 160), (128, 1024, 128, 128),
        (192, 4096, 128, 96), (256, 4096, 128, 80),
    ],
)  # fmt: skip
def test_tiles_are_as_large_as_the_head_dim_allows(dim, queries, rows, keys):
    """With head dim 64, three consumers where that saves a round of blocks."""
    chosen = backend.plans.attention_plan(
        8, 16, 16, queries, queries, dim, dim, element_size=2, multiprocessors=132, plain=True, **HOPPER
    )["forward sm90"]
    assert (chosen["block_m"], chosen["block_n"]) == (rows, keys)
    assert chosen["shared_bytes"] + 1024 <= HOPPER["shared_limit"]


@pytest.mark.parametrize(("given", "text"), [("1", "the kernels for sm_90a"), ("", "FASTGEN_SM90=1 takes")])
def test_info_says_whether_they_are_taken(monkeypatch, given, text):
    assert_info_says(monkeypatch, "attention_forward", given, text)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    assert "sm_90a" not in environment._served_by("attention_forward", torch.device("cuda", 0))


def test_a_tensor_map_is_a_parameter_that_stays_in_place():
    """A kernel that took it by value would give the hardware an address of local memory."""
    sources = "".join(path.read_text() for path in (build.CSRC / "attention" / "sm90").glob("*.cuh"))
    kernels = re.findall(r"__global__[^{]*\{", sources)
    assert kernels
    for kernel in kernels:
        assert re.search(r"const __grid_constant__ \w*Maps", kernel)
