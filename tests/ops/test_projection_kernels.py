"""The CUDA kernels of the projections: every pair of settings against float64, in the emulator and on a GPU, and what
they do besides being right: one order of every sum, every barrier needed, no bank conflicts, refusals by name."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

import fastgen
from fastgen import backend, reference
from fastgen.backend import selection
from fastgen.cli import main
from fastgen.functional import merge_heads_projection, qkv_projection
from fastgen.ops.projection import plan
from fastgen.testing import largest_error
from tests.conftest import PLACES, place_or_skip
from tests.covering import covering
from tests.emulator import build
from tests.ops.test_projection import check, rotate, tables

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PARTS = {
    "sagan": ((1, 1, 1), (8, 8, 32)),
    "grouped": ((4, 2, 2), (16, 16, 16)),
    "one": ((3,), (24,)),
    "dit": ((2, 2, 1), (72, 72, 40)),
    "wide": ((1, 1, 1), (128, 128, 136)),
}
LAYOUTS = ["tokens", "length first", "feature map", "strided", "unaligned"]
LENGTHS = [1, 20, 49, 64, 130]
CHANNELS = [8, 40, 72, 136]


@pytest.fixture(
    params=[p for p in PLACES if p[0] in ("emulated", "compiled") and p != ("compiled", "cpu")], ids="-".join
)
def place(request):
    device = place_or_skip(*request.param, "projection_forward")
    if request.param[0] == "emulated":
        request.getfixturevalue("emulator")
    with fastgen.use_backend(request.param[0]):
        yield device


def tokens_in(layout: str, batch: int, length: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, N, C), or (B, C, N) for a feature map."""
    if layout == "length first":
        return torch.randn(length, batch, channels).to(dtype).transpose(0, 1)
    if layout == "feature map":
        return torch.randn(batch, channels, length).to(dtype)
    if layout == "strided":
        return torch.randn(batch, 2 * length, channels + 8).to(dtype)[:, ::2, :channels]
    if layout == "unaligned":
        return torch.randn(batch, length, channels + 1).to(dtype)[..., 1:]
    return torch.randn(batch, length, channels).to(dtype)


# --------------------------------------------------------------------------------------------------
# Tokens to heads


class Projection(NamedTuple):
    dtype: torch.dtype
    parts: str
    layout: str
    length: int
    channels: int
    bias: bool
    epilogue: str
    batch: int

    def __str__(self) -> str:
        words = [str(self.dtype).removeprefix("torch."), self.parts, self.layout, f"{self.length}x{self.channels}"]
        return " ".join([*words, *(["bias"] if self.bias else []), self.epilogue, f"B{self.batch}"])


def products(point: Any) -> int:
    """What the emulator computes for one item of the batch."""
    dtype, parts, _, length, channels, *_ = point
    heads, dims = PARTS[parts]
    rows = sum(h * d for h, d in zip(heads, dims, strict=True))
    return rows * channels * length * (3 if dtype == torch.float32 else 1)


def affordable(point: Any) -> bool:
    return products(point) <= 3_000_000


AXES = [
    DTYPES,
    list(PARTS),
    LAYOUTS,
    LENGTHS,
    CHANNELS,
    [True, False],
    ["plain", "norms", "rotary", "both", "interleaved", "batched"],
    [1, 3],
]
PROJECTIONS = [Projection(*point) for point in covering(AXES, affordable, lambda p: products(p) * p[-1])]


@pytest.mark.parametrize("case", PROJECTIONS, ids=str)
def test_every_pair_of_settings(case, place):
    heads, dims = PARTS[case.parts]
    rows = sum(h * d for h, d in zip(heads, dims, strict=True))
    normed = min(2, len(heads)) if case.epilogue not in ("plain", "rotary") else 0
    rotated = min(2, len(heads)) if case.epilogue not in ("plain", "norms") else 0
    interleaved = case.epilogue == "interleaved"
    rotary = tables(case.length, 4, case.batch if case.epilogue == "batched" else None) if rotated else None
    rotary = rotary and tuple(table.to(place) for table in rotary)
    leaves = [
        tokens_in(case.layout, case.batch, case.length, case.channels, case.dtype),
        torch.randn(rows, case.channels).div(case.channels**0.5).to(case.dtype),
        *([torch.randn(rows).to(case.dtype)] if case.bias else []),
        *((1 + 0.3 * torch.randn(dim)).to(case.dtype) for dim in dims[:normed]),
    ]

    def split(rest):
        return (rest[0], rest[1:]) if case.bias else (None, rest)

    def ours(x, weight, *rest):
        bias, norms = split(rest)
        options = {"norms": norms, "rotary": rotary, "rotated": max(rotated, 1), "interleaved": interleaved}
        options["channels_first"] = case.layout == "feature map"
        return qkv_projection(x, weight, bias, heads=heads, head_dims=dims, **options)

    def plain(x, weight, *rest):
        bias, norms = split(rest)
        x = x.transpose(1, 2) if case.layout == "feature map" else x
        parts = list(reference.split_heads(F.linear(x, weight, bias), list(heads), list(dims)))
        for i, norm in enumerate(norms):
            parts[i] = F.rms_norm(parts[i], norm.shape, norm, 1e-6)
        for i in range(rotated):
            wide = parts[i].float() if parts[i].dtype.itemsize < 4 else parts[i]
            parts[i] = rotate(wide, *rotary, interleaved).to(x.dtype)
        return parts

    check(ours, plain, [leaf.to(place) for leaf in leaves])


# --------------------------------------------------------------------------------------------------
# Heads to tokens


class Merge(NamedTuple):
    dtype: torch.dtype
    heads: tuple[int, int]
    layout: str
    length: int
    channels: int
    bias: bool
    residual: bool
    gate: str
    batch: int

    def __str__(self) -> str:
        words = [str(self.dtype).removeprefix("torch."), "{}x{}".format(*self.heads), self.layout]
        flags = [name for name in ("bias", "residual") if getattr(self, name)]
        return " ".join([*words, f"{self.length}x{self.channels}", *flags, f"gate {self.gate}", f"B{self.batch}"])


def merge_products(point: Any) -> int:
    dtype, (heads, dim), _, length, channels, *_ = point
    return heads * dim * channels * length * (3 if dtype == torch.float32 else 1)


def merge_affordable(point: Any) -> bool:
    return merge_products(point) <= 3_000_000


MERGE_AXES = [
    DTYPES,
    [(1, 32), (4, 16), (2, 72), (1, 136)],
    ["tokens", "feature map"],
    LENGTHS,
    CHANNELS,
    [True, False],
    [True, False],
    ["none", "scalar", "channel", "batch"],
    [1, 3],
]
MERGES = [Merge(*point) for point in covering(MERGE_AXES, merge_affordable, lambda p: merge_products(p) * p[-1])]


@pytest.mark.parametrize("case", MERGES, ids=str)
def test_every_pair_of_settings_of_the_way_back(case, place):
    (heads, dim), first = case.heads, case.layout == "feature map"
    shape = (case.batch, case.channels, case.length) if first else (case.batch, case.length, case.channels)
    gates = {"scalar": (1,), "channel": (case.channels,), "batch": (case.batch, case.channels)}
    leaves = {
        "x": torch.randn(case.batch, case.length, heads, dim).transpose(1, 2),
        "weight": torch.randn(case.channels, heads * dim) / (heads * dim) ** 0.5,
        **({"bias": torch.randn(case.channels)} if case.bias else {}),
        **({"residual": torch.randn(shape)} if case.residual else {}),
        **({"gate": torch.randn(gates[case.gate])} if case.gate != "none" else {}),
    }

    def ours(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        return merge_heads_projection(named.pop("x"), named.pop("weight"), **named, channels_first=first)

    def plain(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        y = F.linear(reference.join_heads(named["x"]), named["weight"], named.get("bias"))
        gate = named.get("gate")
        y = y if gate is None else y * (gate.unsqueeze(1) if gate.dim() == 2 else gate)
        y = y.transpose(1, 2) if first else y
        return named["residual"] + y if case.residual else y

    check(ours, plain, [leaf.to(case.dtype).to(place) for leaf in leaves.values()])


# --------------------------------------------------------------------------------------------------
# Besides being right

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

NUMBERS = {"eps": 1e-6, "rotated": 2, "interleaved": False}


@pytest.fixture
def emulated(emulator):
    build.register()
    return torch.ops.fastgen_emulated


def operands(dtype=torch.bfloat16, batch=2, length=70, channels=40):
    x, weight = torch.randn(batch, length, channels).to(dtype), torch.randn(96, channels).to(dtype)
    norms = [torch.randn(16).to(dtype) for _ in range(2)]
    return x, weight, torch.randn(96).to(dtype), norms, *(t.unsqueeze(0) for t in tables(length, 8))


def everything(ops, x, weight, bias, norms, cos, sin, tf32=False):
    """Results of the four operators."""
    heads, dims = [3, 2, 1], [16, 16, 16]
    *parts, first, second = ops.projection_forward(
        x, weight, bias, norms, cos, sin, heads, dims, False, 1e-6, 2, False, True, tf32
    )
    arguments = (x, weight, norms, cos, sin, True, False, 1e-6, 2, False, tf32)
    grads = ops.projection_backward([torch.ones_like(p) for p in parts], [first, second], *arguments)
    out = torch.randn(72, 48, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    gate = torch.full((1, 1, 1), 0.5, dtype=x.dtype)
    merged = ops.merge_heads_forward(parts[0], out, None, None, gate, False, tf32)
    back = ops.merge_heads_backward(torch.ones_like(merged), parts[0], out, None, gate, False, tf32)
    return [*parts, first, second, *grads[:3], *grads[3], merged, *back]


def test_every_schedule_gives_the_same_bits(emulator, emulated):
    tensors = operands()
    results = []
    for schedule in range(4):
        emulator.configure(seed=schedule)
        results.append(torch.cat([t.float().flatten() for t in everything(emulated, *tensors)]))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_no_barrier_and_no_wait_can_be_left_out(emulator, emulated):
    tensors = operands(batch=1, channels=200)
    emulator.configure()
    everything(emulated, *tensors)
    starts = tuple(f"{what} csrc/projection/" for what in ("sync_block", "sync_warp", "async_copy_wait"))
    sites = [site for site in emulator.sites() if site.startswith(starts)]
    assert len(sites) >= 6
    for site in sites:
        found = []
        for seed in range(3):
            emulator.configure(seed=seed, leave_out=site)
            try:
                everything(emulated, *tensors)
            except RuntimeError as error:
                found.append(str(error))
        assert found, f"{site} can be left out"
        assert all("emulator: " in text for text in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_first", [False, True], ids=["tokens", "feature map"])
def test_products_have_no_bank_conflicts(emulator, emulated, channels_first, dtype):
    def conflicts():
        kernels = emulator.statistics()
        return [kernels[name]["bank_conflicts"] for name in kernels if name == "projection_weight_gradient"]

    x = torch.randn(2, 72, 64).to(dtype)
    weight = torch.randn(64, 64 if not channels_first else 72).to(dtype)
    grads = [torch.randn(2, 4, 72 if not channels_first else 64, 16).to(dtype)]
    before = sum(conflicts())
    emulated.projection_backward(grads, [], x, weight, [], None, None, True, channels_first, 0.0, 0, False, False)
    assert sum(conflicts()) == before


def test_tf32_is_taken_only_where_it_is_allowed(emulator, emulated):
    tensors = operands(torch.float32)
    wide = [[t.double() for t in v] if isinstance(v, list) else v.double() for v in tensors]
    exact = everything(torch.ops.fastgen_torch, *wide)
    worst = []
    for allowed in (False, True):
        got = everything(emulated, *tensors, tf32=allowed)
        pairs = [(a, b) for a, b in zip(got, exact, strict=True) if b.numel()]
        worst.append(max(largest_error(a, b) / max(1.0, float(b.abs().max())) for a, b in pairs))
    assert worst[0] < 3e-6 < 1e-4 < worst[1] < 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_lie_as_the_fake_promises(emulated, layout):
    x, first = tokens_in(layout, 2, 20, 24, torch.float16), layout == "feature map"
    weight, norm = torch.randn(32, 24).half(), torch.randn(16).half()
    options = ([norm], None, None, [1, 1], [16, 16], first, 1e-6, 0, False, True, False)
    got = emulated.projection_forward(x, weight, None, *options)
    meta = torch.ops.fastgen.projection_forward(x.to("meta"), weight.to("meta"), None, [norm.to("meta")], *options[1:])
    assert [(g.shape, g.stride(), g.dtype) for g in got] == [(m.shape, m.stride(), m.dtype) for m in meta]
    grads = emulated.projection_backward(
        got[:2], got[2:], x, weight, [norm], None, None, True, first, 1e-6, 0, False, False
    )
    wanted = torch.ops.fastgen_torch.projection_backward(
        got[:2], got[2:], x, weight, [norm], None, None, True, first, 1e-6, 0, False, False
    )
    for a, b in zip([*grads[:3], *grads[3]], [*wanted[:3], *wanted[3]], strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


H200 = 9


def test_the_plan_takes_cublas_for_large_products_and_kernels_where_passes_are_saved():
    large = plan.heads_problem(8192, 1152, [(16, 72)] * 3, 0, 0, 2)
    assert plan.estimate(large, H200).takes_library
    assert not plan.estimate(plan.heads_problem(65536, 64, [(1, 8), (1, 8), (1, 32)], 0, 0, 2), H200).takes_library
    with_turns = plan.heads_problem(8192, 1152, [(18, 64)] * 3, 2, 2, 2)
    assert not plan.estimate(with_turns, H200).takes_library
    gated = plan.merge_problem(65536, 32, 64, 2, residual=True, gate=True, channels_first=True)
    assert not plan.estimate(gated, H200).takes_library
    # At float32 accuracy three products in tf32 beat one on Ampere's other units.
    assert not plan.estimate(large._replace(element_size=4), 8).takes_library


def test_the_plan_decides_only_where_no_backend_is_forced(monkeypatch):
    """As on a GPU: where there is a kernel."""
    monkeypatch.setattr(selection, "_place", lambda *arguments: (backend.COMPILED, None))
    x = torch.randn(1, 2, 8)
    for forced, slower, wanted in [
        ("auto", False, backend.COMPILED),
        ("auto", True, backend.TORCH),
        ("compiled", True, backend.COMPILED),
        ("torch", False, backend.TORCH),
    ]:
        with fastgen.use_backend(forced):
            assert backend.select("projection_forward", x, slower=slower) == wanted
    with fastgen.use_backend("compiled"), pytest.raises(RuntimeError, match="multiples of 8, not 12"):
        backend.select("projection_forward", x, plan.refused(torch.half, [8, 12]))
    assert plan.refused(torch.float32, [8, 12]) is None
    assert "up to 4 parts, not 5" in plan.refused(torch.float32, [8], 5)
    assert "up to 128, not 136" in plan.refused(torch.float32, [8], 3, [136])


needs_module = pytest.mark.skipif(backend.plans.why_not() is not None, reason="the CPU library is not loaded")


@needs_module
def test_info_and_its_command_show_the_plan(capsys):
    found = fastgen.info(projection=(64, 1024, 64, 48)).plans
    assert found["projection, forward and backward, by roofline"]["taken"] == "kernels"
    assert found["projection forward"]["tile"] == (128, 128)
    assert found["projection weight gradient"]["splits"] > 100
    assert main(["info", "--projection", "32,256,1152,3456"]) == 0
    assert "taken cuBLAS" in capsys.readouterr().out
    for sizes, text in [((1, 2, 3), "four positive integers"), ((1, 2, 12, 8), "multiples of 8, not 12")]:
        with pytest.raises(ValueError, match=text):
            fastgen.info(projection=sizes)
    assert main(["info", "--projection", "1,x"]) == 2
    assert "--projection: expected B,N,C,E, got 1,x" in capsys.readouterr().err


@needs_module
@pytest.mark.parametrize("multiprocessors", [1, 108, 132])
def test_tiles_hold_a_head_whole_and_cover_the_problem(multiprocessors):
    for tokens in (1, 64, 8192):
        for outputs in (8, 48, 3456):
            shared = backend.plans.projection_plan(1, tokens, 64, outputs, 72, 2, multiprocessors)
            (rows, columns), blocks = shared["forward"]["tile"], shared["forward"]["blocks"]
            assert columns >= 72
            assert rows * columns * blocks >= tokens * outputs
            gradient = shared["weight gradient"]
            assert gradient["blocks"] % gradient["splits"] == 0
            assert gradient["splits"] <= max(1, -(-tokens // 32 // 8) + 1)


def test_bad_operands_are_refused_by_name(emulated):
    x, weight = torch.randn(2, 6, 16), torch.randn(24, 16)

    def forward(x=x, weight=weight, norms=(), heads=(3,), dims=(8,), cos=None, **options):
        tail = (list(heads), list(dims), False, 1e-6, 1, False, False, False)
        return emulated.projection_forward(x, weight, options.get("bias"), list(norms), cos, cos, *tail)

    many = {"heads": [1] * 5, "dims": [8] * 5, "weight": torch.randn(40, 16)}
    wide = {"heads": [1], "dims": [136], "weight": torch.randn(136, 16), "norms": [torch.randn(136)]}
    for options, text in [
        ({"x": torch.randn(2, 6, 15), "weight": torch.randn(24, 15)}, "x: .*multiples of 4, got 15"),
        ({"heads": [4], "dims": [6]}, "head_dims: .*multiples of 4, got 6"),
        ({"weight": weight.half()}, "weight: expected the dtype of x"),
        ({"weight": torch.randn(32, 16)}, r"weight: expected \(24, 16\)"),
        ({"bias": torch.randn(23)}, "bias: expected 24 elements, got 23"),
        ({"norms": [torch.randn(7)]}, "norms: expected 8 elements, got 7"),
        ({"cos": torch.randn(1, 5, 2)}, "cos, sin: expected float32 tables"),
        ({"cos": torch.randn(1, 6, 5)}, "cos, sin: expected tables of at most half the head dim"),
        ({"x": x.double(), "weight": weight.double()}, "x: expected float32, float16 or bfloat16"),
        (many, "heads: kernels take up to 4 parts, got 5"),
        (wide, "norms, cos: kernels normalize and rotate heads of up to 128 channels"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            forward(**options)
