"""Results on matrix instructions that round as tensor cores do, and operands that float32 cannot split into two parts.

The hardware truncates what it adds to an accumulator, in an order and with bits that the PTX ISA leaves open. The
emulator has several of them (tests/emulator/README.md), and every one has to keep the limits.
"""

from __future__ import annotations

import math

import pytest
import torch

import fastgen
from fastgen.functional import multi_head_projection
from fastgen.functional import scaled_dot_product_attention as attention
from fastgen.testing import assert_accurate
from tests.emulator import build
from tests.ops.attention_cases import DTYPES, Case, check, check_second_order
from tests.ops.test_projection import check as check_projection

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

MEASURED = ("volta", "ampere", "hopper")
HOST = torch.device("cpu")


@pytest.fixture
def emulated(emulator):
    build.register()
    with fastgen.use_backend("emulated"):
        yield emulator


# --------------------------------------------------------------------------------------------------
# Accuracy in every rounding


def check_forward(dim, queries=16, keys=257):
    query, key, value = (torch.randn(1, 1, n, dim) for n in (queries, keys, keys))

    def plain(dtype):
        q, k, v = (t.to(dtype) for t in (query, key, value))
        return ((q @ k.mT) / math.sqrt(dim)).softmax(-1) @ v

    assert_accurate(attention(query, key, value), plain(torch.float32), plain(torch.float64))


@pytest.mark.parametrize("mode", MEASURED)
def test_a_long_sum_of_float32(emulated, mode):
    """Head dims and keys that the sums of a plain accumulator failed at."""
    emulated.configure(rounding=mode)
    check_forward(64)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MEASURED)
@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_long_sums_of_float32_in_every_head_dim(emulated, mode, dim):
    emulated.configure(rounding=mode)
    check_forward(dim, queries=64, keys=1025)


QUICK = [
    Case(torch.float32, (64, 64), 20, 70, "window", heads=(2, 1), batch=1),
    Case(torch.bfloat16, (64, 64), 70, 130, "float", heads=(1, 1), batch=1),
    Case(torch.float16, (24, 40), 70, 130, "bool", dropout=0.3, heads=(1, 1), batch=1),
]
MORE = [
    Case(dtype, dims, 80, 203, mask, dropout, batch=1)
    for dtype in DTYPES
    for dims in ((16, 32), (64, 64), (96, 96), (128, 128), (256, 256))
    for mask, dropout in (("none", 0.0), ("float", 0.3), ("causal window", 0.0))
]


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_attention_and_its_gradients(emulated, case):
    for seed in range(2):
        emulated.configure(seed=seed, rounding="any")
        check(case, HOST, seed)


@pytest.mark.parametrize("case", QUICK[:2], ids=str)
def test_tangents_and_second_order(emulated, case):
    emulated.configure(seed=1, rounding="any")
    check_second_order(case._replace(queries=20, keys=40), HOST)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MEASURED)
@pytest.mark.parametrize("case", MORE, ids=str)
def test_attention_and_its_gradients_in_every_head_dim(emulated, case, mode):
    emulated.configure(rounding=mode)
    check(case, HOST)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MEASURED)
@pytest.mark.parametrize("case", MORE, ids=str)
def test_tangents_and_second_order_in_every_head_dim(emulated, case, mode):
    emulated.configure(rounding=mode)
    check_second_order(case._replace(queries=40, keys=113), HOST)


def projection(dtype, length, channels, rows=32):
    leaves = [torch.randn(1, length, channels), torch.randn(rows, channels) / channels**0.5, torch.randn(rows)]
    leaves = [t.to(dtype) for t in leaves]

    def ours(x, weight, bias):
        return multi_head_projection(x, weight, bias, num_heads=2)

    def plain(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias).unflatten(-1, (2, -1)).transpose(1, 2)

    check_projection(ours, plain, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projections_and_their_gradients(emulated, dtype):
    for mode in MEASURED if dtype == torch.float32 else ("hopper",):
        emulated.configure(rounding=mode)
        projection(dtype, 40, 264)  # sums over channels
        projection(dtype, 530, 16, rows=16)  # over tokens


@pytest.mark.slow
@pytest.mark.parametrize("mode", MEASURED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projections_of_many_channels_and_tokens(emulated, dtype, mode):
    emulated.configure(rounding=mode)
    projection(dtype, 128, 2048)
    projection(dtype, 4096, 64)


# --------------------------------------------------------------------------------------------------
# Operands that have no high and low part

LARGEST = torch.finfo(torch.float32).max
SPECIAL = {
    "inf": [math.inf],
    "-inf": [-math.inf],
    "nan": [math.nan],
    "nan of the device": [torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).item()],
    "inf and -inf": [math.inf, -math.inf],
    "the largest": [LARGEST],
    "almost the largest": [math.ldexp(1 - 2.0**-12, 128), math.ldexp(1 - 2.0**-13, 128)],
    "near the largest": [math.ldexp(1 - 2.0**-11 - 2.0**-24, 128)],
    "denormal": [2.0**-130],
}


def assert_like_the_formula(actual, left, right):
    """Equal infinities and NaN; the rest to float32, or to tf32 where an operand is next to the largest float.

    A product of finite numbers that overflows is inf or NaN: its parts may have different signs.
    """
    exact, sizes = left.double() @ right.double().mT, left.double().abs() @ right.double().abs().mT
    largest = (left.double()[:, None] * right.double()).abs().amax(-1)
    finite, overflows, special = sizes <= LARGEST, sizes.isfinite() & (largest > 2 * LARGEST), ~sizes.isfinite()
    assert not bool(actual[overflows].isfinite().any())
    torch.testing.assert_close(actual[special].double(), exact[special], equal_nan=True)
    assert bool(((actual - exact).abs() <= 1e-6 + 2.0**-10 * sizes)[finite].all())


@pytest.mark.parametrize("others", ["ones", "normals"])
@pytest.mark.parametrize("name", SPECIAL)
def test_products_of_special_values_are_those_of_the_formula(emulated, name, others):
    """Of exact tf32 numbers the low part is 0, which must not meet an infinity."""
    x, weight = (torch.randn(16, 8) if others == "normals" else torch.ones(16, 8) for _ in range(2))
    for i, value in enumerate(SPECIAL[name]):
        x[3, 2 + i], weight[5, 2 + i] = value, value
        x[7, i] = value
    weight[6, :2] = 0
    for a, b in ((x, weight), (x, 0.25 * torch.ones(16, 8)), (0.25 * torch.ones(16, 8), weight)):
        out = multi_head_projection(a[None], b, num_heads=1)[0, 0]
        assert_like_the_formula(out, a, b)


@pytest.mark.parametrize("name", ["inf", "-inf", "nan", "nan of the device", "inf and -inf"])
def test_products_in_tf32_keep_infinities_and_nan(emulated, monkeypatch, name):
    """Without a low part, the high part has the value: the device's NaN would become -0 by rounding up."""
    for operators in (fastgen.functional.projection, fastgen.ops.projection.operator_path):
        monkeypatch.setattr(operators, "may_use_tf32", lambda _: True)
    x, weight = torch.randn(16, 8), torch.randn(16, 8)
    for i, value in enumerate(SPECIAL[name]):
        x[3, 2 + i], weight[5, 2 + i] = value, value
    out = multi_head_projection(x[None], weight, num_heads=1)[0, 0]
    wanted = x @ weight.mT
    assert not bool(torch.isfinite(wanted[3]).any() or torch.isfinite(wanted[:, 5]).any())
    torch.testing.assert_close(out, wanted, rtol=0.01, atol=0.02, equal_nan=True)


def test_infinite_keys_and_values_of_attention(emulated):
    """A score of -inf is a weight of 0; an infinite value reaches the rows that attend to it, in its column."""
    query, key, value = torch.ones(1, 1, 20, 16), torch.randn(1, 1, 40, 16), torch.randn(1, 1, 40, 16)
    key[:, :, 7, 3] = -math.inf
    value[:, :, 9, 4], value[:, :, 12, 5] = math.inf, -math.inf

    def plain(dtype):
        q, k, v = (t.to(dtype) for t in (query, key, value))
        return (q @ k.mT / 4).softmax(-1) @ v

    out = attention(query, key, value)
    assert_accurate(out, plain(torch.float32), plain(torch.float64))
    assert bool((out[..., 4] == math.inf).all())
    assert bool((out[..., 5] == -math.inf).all())


# --------------------------------------------------------------------------------------------------
# Strides that no element is reached by


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dim_of_size_1_may_have_any_stride(emulated, dtype):
    """Rows past the end are not read, but cp.async wants their addresses aligned too."""
    size = 16 // torch.finfo(dtype).bits * 8
    rows = torch.randn(3, 24 + size + 1).to(dtype)
    query, key, value = (one[: size * 2].as_strided((1, 1, 1, size * 2), (3, 5, 7, 1)) for one in rows[:, size:])
    tensors = [t if t.data_ptr() % 16 == 0 else t.clone().as_strided(t.shape, t.stride()) for t in (query, key, value)]
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = attention(*leaves)
    torch.testing.assert_close(out, leaves[2])  # one key
    out.sum().backward()
    torch.testing.assert_close(leaves[2].grad, torch.ones_like(out))
