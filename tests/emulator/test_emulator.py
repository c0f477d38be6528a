"""Findings of the emulator: planted bugs are found, correct kernels pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.emulator import build
from tests.emulator.samples import SAMPLES, TRICKY, run_tricky, to_bfloat16
from tests.emulator.test_device_layer import fragments

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

SEEDS = range(40)  # a planted bug must be found with one of them
# Read from the source, so that collecting the tests does not build the emulator.
_SOURCE = (build.HERE / "kernels" / "planted.cu").read_text()
_FINDINGS = dict(re.findall(r'(k\w+)\[\] = "([^"]*)"', _SOURCE))
PLANTED = [
    (number, (sample, mistake, _FINDINGS[finding]))
    for number, (sample, mistake, finding) in enumerate(
        re.findall(r"(?<!define )FASTGEN_PLANT\(\s*(\w+),\s*(\w+),\s*(\w+)\)", _SOURCE)
    )
]


def counted(module, kernel, call):
    """The counters that a call adds to a kernel."""
    before = module.statistics().get(kernel, {})
    call()
    return {name: count - before.get(name, 0) for name, count in module.statistics()[kernel].items()}


def outcome(module, call, launch, which, **options):
    """The outcome of a run: the kind of its finding, "wrong result", or "nothing"."""
    module.configure(**options)
    try:
        result = call.run(launch, which)
    except module.Finding as finding:
        return str(finding).splitlines()[0].removeprefix("emulator: ")
    return "nothing" if call.is_right(result) else "wrong result"


# --------------------------------------------------------------------------------------------------
# Planted bugs


@pytest.mark.parametrize("name", SAMPLES)
def test_a_correct_kernel_passes_every_schedule(emulator, name):
    call = SAMPLES[name]()
    outcomes = {outcome(emulator, call, emulator.run, name, seed=seed) for seed in SEEDS}
    assert outcomes == {"nothing"}


@pytest.mark.parametrize("name", TRICKY)
def test_an_unusual_correct_kernel_passes_every_schedule(emulator, name):
    for seed in range(20):
        emulator.configure(seed=seed)
        assert run_tricky(emulator.run, name).all(), f"seed {seed}"


@pytest.mark.parametrize(("number", "planted"), PLANTED, ids=[f"{p[0]}-{p[1]}" for _, p in PLANTED])
def test_a_planted_bug_is_found_by_its_check(emulator, number, planted):
    sample, _, finding = planted
    call = SAMPLES[sample]()
    seen = set()
    for seed in SEEDS:
        seen.add(outcome(emulator, call, emulator.run_planted, number, seed=seed))
        if finding in seen:
            return
    pytest.fail(f"expected '{finding}', found only {seen}")


def test_the_planted_bugs_are_those_of_the_source(emulator):
    assert [planted for _, planted in PLANTED] == emulator.planted()


def test_every_kind_of_finding_is_planted():
    found = {planted[2] for _, planted in PLANTED}
    assert found == {
        "out of bounds",
        "misaligned",
        "read of uninitialized memory",
        "race",
        "unfinished asynchronous copy",
        "unfinished matrix product",
        "missing proxy fence",
        "divergence",
        "deadlock",
        "exited thread",
        "misuse",
        "wrong result",
    }
    assert len(PLANTED) >= 25


@pytest.mark.parametrize("name", SAMPLES)
def test_no_barrier_and_no_wait_of_a_sample_can_be_left_out(emulator, name):
    """Each synchronizing call of the correct kernel is left out in turn, and every time a finding is reported."""
    call = SAMPLES[name](192) if name == "attention" else SAMPLES[name]()
    assert outcome(emulator, call, emulator.run, name) == "nothing"
    sites = emulator.sites()
    assert sites
    for site in sites:
        outcomes = {outcome(emulator, call, emulator.run, name, seed=seed, leave_out=site) for seed in range(5)}
        assert "nothing" not in outcomes, f"{site} could be left out: is it needed?"


def test_no_barrier_of_the_latent_kernels_can_be_left_out(emulator):
    build.register()
    call = lambda: torch.ops.fastgen_emulated.latent_forward(mu, mu, None, None, torch.tensor([1]), True)  # noqa: E731
    mu = torch.randn(2, 3000)
    emulator.configure()
    call()
    (site,) = emulator.sites()
    assert site.startswith("sync_block csrc/common/reduce.cuh:")
    emulator.configure(leave_out=site)
    with pytest.raises(RuntimeError, match=r"emulator: (race|read of uninitialized memory)"):
        call()


# --------------------------------------------------------------------------------------------------
# Reports


def report(module, sample, mistake, seed=0):
    number = next(i for i, (s, m, _) in enumerate(module.planted()) if (s, m) == (sample, mistake))
    module.configure(seed=seed)
    with pytest.raises(module.Finding) as caught:
        SAMPLES[sample]().run(module.run_planted, number)
    return str(caught.value)


def test_a_report_names_kernel_block_thread_line_and_address(emulator):
    text = report(emulator, "reverse", "kNoBarrier", seed=3)
    assert text.startswith("emulator: race\n")
    assert re.search(
        r"(reads|writes) 4 bytes at shared variable of type \S*reverse::Tile \+ \d+ \(of 512 bytes\)", text
    )
    place = r"thread \d+ \(warp \d, lane \d+\)"
    assert re.search(rf"kernel reverse \(kNoBarrier\), block \(\d, 0, 0\), {place}\n", text)
    source = r"tests/emulator/kernels/exchange\.cuh:\d+ in \S*reverse::kernel"
    assert re.search(rf"  at {source}", text)
    assert re.search(rf"(written|read) by {place} at {source}.*, with no barrier between", text)
    assert "FASTGEN_EMULATOR_SEED=3 replays it" in text


def test_a_deadlock_says_where_each_thread_waits(emulator):
    text = report(emulator, "named_ring", "kNoArrivalAtFull")
    assert re.search(r"threads 0-31 wait in barrier 3 of 64 threads at tests/emulator/kernels/rings.cuh:\d+", text)
    assert re.search(r"threads 32-63 wait in barrier 1 of 64 threads at tests/emulator/kernels/rings.cuh:\d+", text)


def test_one_seed_gives_one_schedule(emulator):
    first, again = (report(emulator, "named_ring", "kNoWaitForEmpty", seed=5) for _ in range(2))
    assert first == again
    others = {report(emulator, "named_ring", "kNoWaitForEmpty", seed=seed) for seed in range(8)}
    assert len({re.sub("seed.*", "", other) for other in others}) > 1


PROBE = """
def test_probe(emulator):
    number = next(i for i, p in enumerate(emulator.planted()) if p[:2] == ("reverse", "kNoBarrier"))
    from tests.emulator.samples import SAMPLES, TRICKY, run_tricky
    SAMPLES["reverse"]().run(emulator.run_planted, number)
"""


def test_a_failing_test_prints_its_seed_and_the_variable_replays_it(emulator, tmp_path):
    (tmp_path / "test_probe.py").write_text(PROBE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(build.ROOT), "FASTGEN_EMULATOR_SEED": "77"}
    done = subprocess.run(command, cwd=build.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FASTGEN_EMULATOR_SEED=77\n" in done.stdout, "the fixture's line"
    first_line = r"thread \d+ \(warp \d, lane \d+\)"
    here = report(emulator, "reverse", "kNoBarrier", seed=77)
    assert re.search(first_line, done.stdout).group() == re.search(first_line, here).group()


# --------------------------------------------------------------------------------------------------
# Tensors as device memory


def test_a_tensor_of_another_allocator_is_not_device_memory(emulator):
    build.register()
    build.track_tensors(False)
    outside = torch.randn(2, 8)
    build.track_tensors(True)
    with pytest.raises(RuntimeError, match=r"out of bounds\n.*(in no memory the kernel was given|behind the end)"):
        torch.ops.fastgen_emulated.latent_forward(outside, outside, None, None, torch.tensor([1]), True)


def test_the_operators_run_in_the_emulator_and_not_in_pytorch(emulator):
    build.register()
    mu = torch.randn(2, 3000)
    arguments = (mu, mu, None, None, torch.tensor([1]), True)
    counts = counted(emulator, "latent_forward", lambda: torch.ops.fastgen_emulated.latent_forward(*arguments))
    assert counts["launches"] == 1
    assert counts["block_barriers"] == counts["blocks"] > 1


# --------------------------------------------------------------------------------------------------
# Limits of a launch, and counters


@pytest.mark.parametrize(
    ("grid", "block", "shared", "text"),
    [
        ((1, 1, 1), (1025, 1, 1), 0, "invalid configuration argument .*at most 1024 threads"),
        ((1, 1, 1), (1, 1, 65), 0, "invalid configuration argument .*64 in z"),
        ((1, 1, 1), (0, 1, 1), 0, "invalid configuration argument"),
        ((0, 1, 1), (1, 1, 1), 0, "invalid configuration argument"),
        ((1, 65536, 1), (1, 1, 1), 0, "invalid configuration argument .*65535"),
        ((1, 1, 1), (32, 1, 1), 99 * 1024 + 1, "invalid argument .*shared memory, 0 static, at most 101376"),
    ],
)
def test_a_launch_over_the_limits_is_refused_as_by_cuda(emulator, grid, block, shared, text):
    emulator.configure(shared_limit=99 * 1024)
    with pytest.raises(RuntimeError, match="coordinates: " + text):
        emulator.run("coordinates", grid, block, shared, [], np.zeros(4, np.uint32), False, [])


def test_static_and_dynamic_shared_memory_share_the_limit(emulator):
    """A kernel's static variables are known from its first launch on, and the next is refused as by CUDA."""

    def reverse(shared):
        arguments = (shared, [np.zeros(4, np.uint32)], np.zeros(4), False, [4])
        emulator.run("reverse", (1, 1, 1), (128, 1, 1), *arguments)

    emulator.configure(shared_limit=4096)
    with pytest.raises(RuntimeError, match=r"static and dynamic shared memory are over the limit|512 static, at most"):
        reverse(4000)
    with pytest.raises(RuntimeError, match=r"invalid argument .*4000 bytes of dynamic .*, 512 static, at most 4096"):
        reverse(4000)
    # Dynamic memory begins at a multiple of 1024 bytes.
    with pytest.raises(RuntimeError, match=r"invalid argument .*3073 bytes"):
        reverse(3073)
    reverse(3072)


def test_shared_memory_over_48_kib_takes_an_opt_in(emulator):
    """csrc/device/launch.cuh opts in where dynamic memory and 2 KiB of static variables are over 48 KiB."""

    def run(shared):  # 8704 bytes of static variables
        arguments = (shared, [np.zeros(160, np.uint32)], np.zeros(96, np.uint32), False, [])
        emulator.run("pitfalls", (2, 1, 1), (32, 1, 1), *arguments)

    run(39 * 1024)
    with pytest.raises(RuntimeError, match="over 48 KiB, with no opt-in"):
        run(46 * 1024)
    run(46 * 1024 + 1)


def test_a_block_larger_than_the_kernels_launch_bounds_is_refused(emulator):
    def run(threads):
        return emulator.run("bounded", (1, 1, 1), (threads, 1, 1), 0, [], np.zeros(threads, np.uint32), False, [])

    np.testing.assert_array_equal(run(64), np.arange(64))
    if "clang" in build.compiler():
        pytest.skip("clang's attribute takes no template argument")
    with pytest.raises(RuntimeError, match=r"too many resources .*\(65, 1, 1\), __launch_bounds__ has at most 64"):
        run(65)


def test_allocations_lie_far_apart(emulator):
    """An access that misses its allocation by up to 16 MiB hits no other."""
    tensors = [torch.empty(size) for size in (1, 100, 10_000, 1_000_000) for _ in range(10)]
    begins = sorted((t.data_ptr(), t.nbytes) for t in tensors)
    gaps = [after - begin - size for (begin, size), (after, _) in pairwise(begins)]
    assert min(gaps) > 16 * 2**20
    offsets = {begin % 2**32 // 4096 for begin, _ in begins}
    assert len(offsets) == len(tensors), "addresses that differ by 2^32"


@pytest.mark.parametrize(("stride", "passes"), [(16, 4), (32, 8), (64, 16), (128, 32), (144, 4)])
def test_bank_conflicts_of_matrix_loads_are_counted(emulator, stride, passes):
    """Eight rows of 16 bytes take one pass unless their banks conflict."""
    tile, out = np.zeros(8 * stride, np.uint32), np.zeros(128, np.uint32)
    arguments = ((1, 1, 1), (32, 1, 1), tile.nbytes, [tile], out, False, [stride])
    counts = counted(emulator, "ldmatrix x4", lambda: emulator.run("ldmatrix x4", *arguments))
    stores = 8 * stride // 32  # one pass each
    assert counts["shared_passes"] - stores == passes
    assert counts["bank_conflicts"] == passes - 4


def test_an_attention_sized_block_is_emulated_in_time(emulator):
    """About 2,000 matrix products of a warp, in under 1 s of CPU with every check and 0.3 s without (best of a few)."""
    call = SAMPLES["attention"]()
    for checks, limit in ((True, 1.0), (False, 0.3)):
        best = float("inf")
        for seed in range(5):
            emulator.configure(seed=seed, checks=checks, count_banks=checks)
            start = time.process_time()
            result = call.run(emulator.run, "attention")
            best = min(best, time.process_time() - start)
            assert call.is_right(result)
        assert best < limit
    emulator.configure()
    counts = counted(emulator, "attention", lambda: call.run(emulator.run, "attention"))
    assert (counts["matrix_products"], counts["bank_conflicts"]) == (2048, 0)


# --------------------------------------------------------------------------------------------------
# Rounding of matrix instructions


def product_of(emulator, kind, left, right, initial):
    """d of a product of which all rows, and all columns, are the same."""
    left, right = (np.asarray(one, np.float32) for one in (left, right))
    to_bits = {"f16": lambda x: x.astype(np.float16).view(np.uint16), "bf16": to_bfloat16}
    rows = [to_bits.get(kind, lambda x: x.view(np.uint32))(np.tile(one, (16, 1))) for one in (left, right)]
    a, b, d = fragments(rows[0], rows[1][:8].T, np.full((16, 8), initial, np.float32))
    got = emulator.run(f"mma {kind}", (1, 1, 1), (32, 1, 1), 0, [a, b, d], np.zeros((32, 4), np.uint32), False, [])
    (value,) = np.unique(got)
    return float(value.view(np.float32))


ULP = 2.0**-23  # of 1


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_rounding_modes_of_matrix_instructions(emulator, kind):
    """By hand, from the blocks and bits that Fasi et al. (2021) measured."""
    depth = 8 if kind == "tf32" else 16
    ones, first = np.ones(depth), np.eye(depth)[0]
    halves = 2.0**-12 * ones, 2.0**-12 * ones  # products of half an ulp of 1
    quarters = 2.0**-12 * ones, 2.0**-13 * ones
    three_quarters = 2.0**-12 * first, 1.5 * 2.0**-12 * ones
    sums = [(*halves, 1.0), (*quarters, 1.0), (*three_quarters, 1.0), (-three_quarters[0], three_quarters[1], -1.0)]
    for mode, wanted in {
        "nearest": [1 + depth / 2 * ULP, 1 + depth / 4 * ULP, 1 + ULP, -1 - ULP],
        "volta": [1, 1, 1, -1],
        "ampere": [1 + depth / 2 * ULP, 1, 1, -1],  # one bit more
        "hopper": [1 + depth / 2 * ULP, 1 + depth / 4 * ULP, 1, -1],  # two
    }.items():
        emulator.configure(rounding=mode)
        assert [product_of(emulator, kind, *one) for one in sums] == wanted, mode


@pytest.mark.parametrize("mode", ["nearest", "volta", "ampere", "hopper", "any"])
def test_no_rounding_mode_changes_exact_or_special_sums(emulator, mode):
    emulator.configure(seed=5, rounding=mode)
    ones = np.ones(16)
    infinity, both = ones.copy(), ones.copy()
    infinity[3], both[:2] = np.inf, (np.inf, -np.inf)
    for left, right, first, wanted in [
        (np.arange(16), ones, 8, 128),
        (ones, infinity, 1, np.inf),
        (ones, both, 1, np.nan),
        (0 * ones, infinity, 1, np.nan),
        (0 * ones, ones, 2.0**-149, 2.0**-149),
    ]:
        np.testing.assert_equal(product_of(emulator, "f16", left, right, first), wanted)


def test_a_seed_chooses_rounding_and_order(emulator):
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal(16), rng.standard_normal(16)

    def drawn(seed):
        emulator.configure(seed=seed, rounding="any")
        return product_of(emulator, "f16", left, right, 1)

    results = [drawn(seed) for seed in range(40)]
    assert results == [drawn(seed) for seed in range(40)]
    assert len(set(results)) > 1
    with pytest.raises(ValueError, match="expected nearest, volta, ampere, hopper or any, got up"):
        emulator.configure(rounding="up")


# --------------------------------------------------------------------------------------------------
# Unsupported instructions do not compile


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("device::mma_m16n8k16<float>(d, a, b);", "mma_m16n8k16: no such element type"),
        ("uint32_t r[3]; device::ldmatrix(r, p);", "ldmatrix loads 1, 2 or 4 matrices"),
        ("device::async_copy<12>(p, p);", "cp.async copies 4, 8 or 16 bytes"),
        ("device::atomic_max((float*)p, 1.0f);", "no such atom.max"),
        ("device::wgmma_m64n64k16(d, a, b);", "wgmma_m64n64k16"),
        ("__shared__ float tile[4];", "__shared__"),
        ("float x = __shfl_xor_sync(~0u, 1.0f, 1);", "__shfl_xor_sync"),
        ('asm volatile("bar.warp.sync 0xffffffff;");', "bar.warp.sync"),
        ("device::sync_warp();", None),
    ],
)
def test_an_unknown_instruction_fails_to_compile_with_its_name(tmp_path, body, complaint):
    includes = "".join(f'#include "device/{name}.cuh"\n' for name in ("atomic", "copy", "mma", "vector", "warp"))
    kernel = f"__global__ void kernel(float (&d)[4], uint32_t (&a)[4], uint32_t (&b)[2], void* p) {{ {body} }}"
    source = tmp_path / "kernel.cu"
    source.write_text(f"{includes}namespace fastgen {{ {kernel} }}")
    folders = [f"-I{build.HERE}", f"-I{build.CSRC}"]
    command = [*build.compiler().split(" "), "-std=c++20", *folders, "-x", "c++", "-c", str(source), "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if complaint is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        assert complaint in done.stderr
