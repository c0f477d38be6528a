"""Every instruction of csrc/device/, one kernel each, compared with the semantics of the PTX ISA in numpy.

The same kernels run in the emulator and, where there is one, on a GPU; the wanted bits are the same.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tests.conftest import DEVICES
from tests.emulator import build
from tests.emulator.samples import SAMPLES, TRICKY, from_bfloat16, run_tricky, to_bfloat16

LANES = np.arange(32)
GROUP, IN_GROUP = LANES // 4, LANES % 4  # g and t of csrc/device/mma.cuh
WARP = (32, 1, 1)


@pytest.fixture(params=["emulated", *DEVICES[1:]])
def device(request):
    if request.param == "emulated":
        return request.getfixturevalue("emulator")
    reason = build.why_not_cuda()
    if reason is not None:
        pytest.skip(reason)
    return build.cuda_module()


def run(device, name, inputs, shape, numbers=(), threads=WARP, shared=0, initial=None, dtype=np.uint32):
    if name not in device.kernels():
        pytest.skip(f"{name} needs sm_90")
    out = np.zeros(shape, dtype) if initial is None else initial
    return device.run(name, (1, 1, 1), threads, shared, inputs, out, initial is not None, list(numbers))


def random_words(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, shape, dtype=np.uint32)


# --------------------------------------------------------------------------------------------------
# Threads


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x0000FF00], ids=hex)
@pytest.mark.parametrize("operand", [0, 1, 5, 16, 31])
@pytest.mark.parametrize("mode", ["shuffle_xor", "shuffle_up", "shuffle_down", "shuffle"])
def test_shuffles(device, mode, operand, mask):
    source = {
        "shuffle_xor": LANES ^ operand,
        "shuffle_up": LANES - operand,
        "shuffle_down": LANES + operand,
        "shuffle": np.full(32, operand),
    }[mode]
    source = np.where((source < 0) | (source > 31), LANES, source)
    taking_part = (mask >> LANES & 1).astype(bool)
    if not taking_part[source[taking_part]].all():
        pytest.skip("reads a lane outside the mask: undefined")
    words = random_words(32)
    wanted = np.where(taking_part, words[source], words)
    got = run(device, mode, [words], 32, (operand, np.uint32(mask).astype(np.int32)))
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("pattern", [0, 1, 0x80000001, 0x12345678, 0xFFFFFFFF], ids=hex)
def test_votes(device, pattern):
    predicates = (pattern >> LANES & 1).astype(np.uint32)
    got = run(device, "votes", [predicates], (32, 3))
    assert (got == [pattern, pattern != 0, pattern == 0xFFFFFFFF]).all()


def test_named_barriers_of_two_pairs_of_warps(device):
    words = random_words(128)
    got = run(device, "pairs", [words], 128, threads=(128, 1, 1), shared=512)
    np.testing.assert_array_equal(got, words[np.arange(128) ^ 32])


def test_arrival_without_waiting(device):
    words = random_words(32)
    got = run(device, "one way", [words], 32, threads=(64, 1, 1), shared=128)
    np.testing.assert_array_equal(got, words[::-1])


def test_coordinates(device):
    grid, block = (3, 2, 2), (4, 2, 3)
    got = device.run("coordinates", grid, block, 0, [], np.zeros((12, 24), np.uint32), False, [])
    np.testing.assert_array_equal(got, np.arange(12)[:, None] * 1000 + np.arange(24))


# --------------------------------------------------------------------------------------------------
# Memory


def test_shifts_by_a_word_or_more_give_zero(device):
    """By 0 ... 63 bits, and by nearly 2^32."""
    words, threads = random_words(96), range(96)
    got = run(device, "shifts", [words], (96, 2), threads=(96, 1, 1))
    distances = [min(thread if thread < 64 else (64 - thread) % 2**32, 32) for thread in threads]
    wanted = [[(int(w) << d) % 2**32, int(w) >> d] for w, d in zip(words, distances, strict=True)]
    np.testing.assert_array_equal(got, np.array(wanted, np.uint32))


def test_vectors_through_shared_memory(device):
    words = random_words(64, 4)
    got = run(device, "vectors", [words], (64, 4), threads=(64, 1, 1), shared=1024)
    np.testing.assert_array_equal(got, words[::-1])


def test_atomics(device):
    values = np.random.default_rng(1).integers(1, 1000, 96).astype(np.int32)
    initial = np.array([0, 0, -5, 5000, 0, 0, 0, 0], np.int32)
    got = run(device, "atomics", [values], 8, threads=(96, 1, 1), initial=initial)
    assert got[:1].view(np.float32)[0] == values.sum()
    assert list(got[1:6]) == [values.sum(), values.max(), values.min(), 1, 1]
    assert got[6] in values
    assert got[7] == 1


@pytest.mark.parametrize("valid", ["all", "half", "none"])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_asynchronous_copies_fill_with_zeros(device, size, valid):
    source = np.random.default_rng(2).integers(1, 255, (64, size)).astype(np.uint8)
    count = {"all": size, "half": size // 2, "none": 0}[valid]
    kept = np.where(np.arange(size) < count, source, 0)
    name = f"async_copy {size}"
    got = run(device, name, [source], (64, size), (count,), (64, 1, 1), 64 * size, dtype=np.uint8)
    np.testing.assert_array_equal(got, np.roll(kept, -1, axis=0))


def test_asynchronous_copies_arrive_at_an_mbarrier(device):
    words = random_words(64)
    got = run(device, "async_copy arrive", [words], 64, threads=(64, 1, 1), shared=512)
    np.testing.assert_array_equal(got, np.roll(words, -1) - words)


def test_mbarrier_phases_by_arrivals(device):
    words = random_words(64) // 2
    got = run(device, "mbarrier arrivals", [words], (3, 64), threads=(64, 1, 1), shared=768)
    np.testing.assert_array_equal(got, np.roll(words, -1) + np.arange(3, dtype=np.uint32)[:, None])


def test_mbarrier_phases_by_arrivals_and_bytes(device):
    words = random_words(3)
    got = run(device, "phases", [words], (3, 64), (40,), (64, 1, 1))
    np.testing.assert_array_equal(got, np.repeat(words[:, None], 64, axis=1))


# --------------------------------------------------------------------------------------------------
# Numbers

FLOATS = np.concatenate(
    [
        np.random.default_rng(3).standard_normal(400).astype(np.float32)
        * np.exp2(np.random.default_rng(4).integers(-30, 20, 400)).astype(np.float32),
        np.array([0, -0.0, 1, -1, 65504, 65519, 65520, 1e30, -1e30, np.inf, -np.inf, 6e-8, 3e-8, 2.9e-8], np.float32),
        np.array([0x3F801000, 0x3F803000, 0x3F800FFF, 0x3F808000, 0x3F818000], np.uint32).view(np.float32),  # ties
    ]
)
FLOATS = FLOATS[: len(FLOATS) // 32 * 32] if len(FLOATS) % 32 == 0 else np.resize(FLOATS, -(-len(FLOATS) // 32) * 32)


def convert(device, values):
    values = np.resize(values, 32 * -(-len(values) // 32)).astype(np.float32)
    return run(device, "conversions", [values], (len(values), 6), threads=(len(values), 1, 1)), values


def test_conversions_round_to_nearest_even(device):
    got, values = convert(device, FLOATS)
    tensor = torch.from_numpy(values)
    half, bfloat = (tensor.to(t).view(torch.int16).numpy().view(np.uint16) for t in (torch.half, torch.bfloat16))
    np.testing.assert_array_equal(got[:, 0], half)
    np.testing.assert_array_equal(got[:, 1], bfloat)
    for column, bits in ((2, half), (3, bfloat)):
        np.testing.assert_array_equal(got[:, column] & 0xFFFF, bits)
        np.testing.assert_array_equal(got[:, column] >> 16, bits ^ 0x8000)


def test_tf32_rounds_ties_away_from_zero(device):
    got, values = convert(device, FLOATS)
    bits = values.view(np.uint32)
    wanted = np.where(np.isfinite(values), bits + 0x1000, bits) & 0xFFFFE000
    np.testing.assert_array_equal(got[:, 4] & 0xFFFFE000, wanted)


def test_exp2_approx(device):
    values = np.random.default_rng(5).uniform(-125, 100, 500)
    got, values = convert(device, values)
    wanted = np.exp2(values.astype(np.float64))
    assert np.abs(got[:, 5].view(np.float32) / wanted - 1).max() <= 2.0**-22 + 2.0**-24
    exact = np.array([0, 1, -1, 10, -126, 127, -np.inf, np.inf, -127, -140, -200], np.float32)
    got = convert(device, exact)[0][: len(exact), 5].view(np.float32)
    wanted = np.where(exact < -126, 0, np.exp2(exact.astype(np.float64)))
    np.testing.assert_array_equal(got, wanted.astype(np.float32))


def test_every_half_and_bfloat16_widens_exactly(device):
    bits = np.arange(2**16, dtype=np.uint32)
    got = np.concatenate(
        [run(device, "widenings", [part], (1024, 2), threads=(1024, 1, 1)) for part in bits.reshape(-1, 1024)]
    )
    narrow = torch.from_numpy(bits.astype(np.uint16).view(np.int16))
    for column, dtype in ((0, torch.half), (1, torch.bfloat16)):
        wanted = narrow.view(dtype).float().numpy()
        np.testing.assert_array_equal(got[:, column].view(np.float32), wanted)


# --------------------------------------------------------------------------------------------------
# Matrices. Halves are 16-bit words here; their place in a register is low first.


def registers_of(halves):
    """(..., 2) halves -> registers."""
    return (halves[..., 0].astype(np.uint32) | halves[..., 1].astype(np.uint32) << 16).astype(np.uint32)


def tile_fragment(tile, transposed=False):
    """(8, 8) halves -> a register of each lane."""
    tile = tile.T if transposed else tile
    return registers_of(tile[GROUP[:, None], (2 * IN_GROUP)[:, None] + np.arange(2)])


@pytest.mark.parametrize("stride", [16, 32, 144])
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "trans"])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_ldmatrix(device, matrices, transposed, stride):
    memory = np.random.default_rng(6).integers(0, 2**16, (32, stride // 2)).astype(np.uint16)
    name = f"ldmatrix x{matrices}" + (" trans" if transposed else "")
    got = run(device, name, [memory], (32, matrices), (stride,), shared=memory.nbytes)
    tiles = memory[:, :8].reshape(4, 8, 8)[:matrices]
    wanted = np.stack([tile_fragment(tile, transposed) for tile in tiles], axis=1)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "trans"])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_stmatrix(device, matrices, transposed):
    tiles = np.random.default_rng(7).integers(0, 2**16, (matrices, 8, 8)).astype(np.uint16)
    registers = np.stack([tile_fragment(tile, transposed) for tile in tiles], axis=1)
    name = f"stmatrix x{matrices}" + (" trans" if transposed else "")
    got = run(device, name, [registers], (32, 4), shared=512)
    np.testing.assert_array_equal(got[: 8 * matrices].view(np.uint16).reshape(matrices, 8, 8), tiles)
    assert (got[8 * matrices :] == 7).all()


def fragments(left, right, initial):
    """Registers of A (16, K), B (K, 8) and D (16, 8) for every lane. 16-bit operands have K = 16, tf32 K = 8."""
    rows, columns = GROUP[:, None], (2 * IN_GROUP)[:, None] + np.arange(2)
    if left.shape[1] == 16:
        a = np.stack([registers_of(left[rows + r, columns + c]) for r, c in ((0, 0), (8, 0), (0, 8), (8, 8))], axis=1)
        b = np.stack([registers_of(right[columns + k, rows]) for k in (0, 8)], axis=1)
    else:
        a = np.stack([left[GROUP + r, IN_GROUP + c] for r, c in ((0, 0), (8, 0), (0, 4), (8, 4))], axis=1)
        b = np.stack([right[IN_GROUP + k, GROUP] for k in (0, 4)], axis=1)
    d = np.concatenate([initial[rows + r, columns] for r in (0, 8)], axis=1)
    return a, b, d


@pytest.mark.parametrize("values", ["integers", "normal"])
@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_matrix_products(device, kind, values):
    rng, depth = np.random.default_rng(8), 8 if kind == "tf32" else 16
    draw = rng.standard_normal if values == "normal" else lambda shape: rng.integers(-8, 9, shape)
    left, right, initial = (draw(shape).astype(np.float32) for shape in ((16, depth), (depth, 8), (16, 8)))
    if kind == "f16":
        left, right = (one.astype(np.float16) for one in (left, right))
        bits = [one.view(np.uint16) for one in (left, right)]
    elif kind == "bf16":
        bits = [to_bfloat16(one) for one in (left, right)]
        left, right = (from_bfloat16(one) for one in bits)
    else:
        bits = [one.view(np.uint32) for one in (left, right)]
        left, right = ((one & 0xFFFFE000).view(np.float32) for one in bits)
    a, b, d = fragments(*bits, initial)
    got = run(device, f"mma {kind}", [a, b, d], (32, 4)).view(np.float32)
    wanted = fragments(*bits, left.astype(np.float64) @ right.astype(np.float64) + initial)[2]
    if values == "integers":
        np.testing.assert_array_equal(got, wanted)
    else:
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)


# --------------------------------------------------------------------------------------------------
# The layer itself

# Allowed in csrc/device only: CUDA intrinsics and types, PTX, and shared memory declarations.
INSTRUCTIONS = re.compile(
    r"\basm\b|__shared__|__shfl|__sync|__ballot|__any|__all_|\batomic[A-Z]|__half|__nv_|__float2|__cvta|cuda_(bf16|fp16)|mma\.h"
)


def code_of(path):
    """A source without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def functions_of(folder, pattern):
    return {(path.name, name) for path in folder.glob("*.cuh") for name in re.findall(pattern, code_of(path))}


def test_kernels_use_nothing_but_the_device_layer():
    sources = [path for suffix in ("cu", "cuh", "h") for path in build.CSRC.rglob(f"*.{suffix}")]
    kernels = [path for path in sources if not {"device", "cpu"} & {*path.relative_to(build.CSRC).parts}]
    assert len(kernels) > 10
    for path in [*kernels, *(build.HERE / "kernels").glob("*.cu*")]:
        assert not INSTRUCTIONS.search(code_of(path)), path
        assert "EMULATE" not in code_of(path).upper(), f"{path} refers to the emulator"


DEVICE_FUNCTION = r"__device__ __forceinline__ [\w&* ]+?(\w+)(?:<\w+>)?\("


def test_every_function_of_the_device_layer_has_a_unit_kernel():
    """So that ``make cuda-check`` assembles every function."""
    units = "".join(code_of(path) for path in (build.HERE / "kernels").glob("unit*.cu"))
    names = {name for _, name in functions_of(build.CSRC / "device", DEVICE_FUNCTION)} - {"shared_address"}
    assert {name for name in names if not re.search(rf"device::{name}\b", units)} == set()


def test_every_function_of_the_device_layer_has_a_twin():
    ours = functions_of(build.CSRC / "device", DEVICE_FUNCTION)
    ours |= functions_of(build.CSRC / "device", r"inline (?!__device__)[\w&* ]+? (\w+)\(")
    twins = functions_of(build.HERE / "device", r"(?:__forceinline__|inline) [\w&* ]+?(\w+)\(")
    twins |= functions_of(build.HERE / "device", r"using cpu::(\w+);")
    # The window of shared memory is for PTX alone.
    missing = {(header, name) for header, name in ours if (header, name) not in twins and name != "shared_address"}
    assert len(ours) > 40
    assert not missing


# --------------------------------------------------------------------------------------------------
# Sample kernels


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_kernels(device, name):
    call = SAMPLES[name]()
    assert call.is_right(call.run(device.run, name))


@pytest.mark.parametrize("name", TRICKY)
def test_unusual_kernels(device, name):
    assert run_tricky(device.run, name).all()
