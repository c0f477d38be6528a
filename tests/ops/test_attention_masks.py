"""Windows and masks in the CUDA kernels, at the boundaries of fragments, words of bits, warps and tiles."""

from __future__ import annotations

import math

import pytest
import torch

from fastgen.ops.attention.problem import Options
from fastgen.testing import largest_error
from tests.covering import covering
from tests.emulator import build
from tests.ops.test_attention_kernels import PLAIN, emulated, gradients, operands  # noqa: F401  (a fixture)
from tests.ops.test_attention_second_order_kernels import second_order

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

SMALL = (8, 8)
# A masked or forgotten key of the few that a row has changes results by far more.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2}
BOUNDARIES = (31, 32, 33, 63, 64, 65)
FAR = (2**31 - 2, 2**31 - 1, 2**31, 2**40)


def assert_agrees(operators, queries, keys, mask=None, options=PLAIN, dtype=torch.float32, heads=1, derivatives=2):
    """With PyTorch's implementation in float64: outputs, gradients, and for 2 tangents and second derivatives."""
    tensors = operands(heads=heads, queries=queries, keys=keys, dims=SMALL, dtype=dtype)
    exact = [t.double() for t in tensors]
    exact_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    for function in (gradients, second_order)[:derivatives]:
        got = function(operators, tensors, mask, None, options)
        wanted = function(torch.ops.fastgen_torch, exact, exact_mask, None, options)
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            assert (a is None) == (b is None)
            if a is not None and a.numel() > 0:
                finite = torch.where(b.isfinite(), b, 0)  # lse of fully masked rows
                assert torch.equal(a.isfinite(), b.isfinite()), i
                error = largest_error(torch.where(a.isfinite(), a, 0), finite)
                allowed = max(TOLERANCE[dtype], TOLERANCE[a.dtype]) * max(1.0, float(finite.abs().max()))
                assert error <= allowed, (function.__name__, i, error)


def window(left, right, scale=0.3):
    return PLAIN._replace(window_left=left, window_right=right, scale=scale)


# --------------------------------------------------------------------------------------------------
# Windows


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", BOUNDARIES)
def test_a_causal_mask_is_exact_around_a_word_and_a_fragment(emulated, length, dtype):  # noqa: F811
    assert_agrees(emulated, length, length, options=window(-1, 0), dtype=dtype)


@pytest.mark.parametrize("queries", [1, 15, 17, 129, 145])
@pytest.mark.parametrize("keys", [1, 64, 130])
def test_warps_that_see_all_some_and_none_of_a_ragged_tile(emulated, queries, keys):  # noqa: F811
    for left, right in ((-1, 0), (0, -1), (31, 31), (0, 0), (64, 1)):
        assert_agrees(emulated, queries, keys, options=window(left, right), derivatives=1)
    assert_agrees(emulated, queries, keys, options=window(33, 32), dtype=torch.float16)


@pytest.mark.parametrize("bound", FAR)
def test_bounds_near_the_end_of_an_integer_mean_unbounded(emulated, bound):  # noqa: F811
    tensors = operands(heads=1, queries=33, keys=70, dims=SMALL)
    for options, same in (
        (window(bound, bound), PLAIN),
        (window(bound, 3), window(-1, 3)),
        (window(3, bound), window(3, -1)),
    ):
        for function in (gradients, second_order):
            got, wanted = (function(emulated, tensors, None, None, given) for given in (options, same))
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_window_that_no_key_is_in_gives_zeros(emulated):  # noqa: F811
    tensors = operands(heads=1, queries=200, keys=20, dims=SMALL)
    out, lse, *_ = gradients(emulated, tensors, options=window(5, 5))
    assert (out[:, :, 25:] == 0).all()
    assert (lse[:, :, 25:] == -math.inf).all()
    assert_agrees(emulated, 200, 20, options=window(5, 5))


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(emulated, scale, mask):  # noqa: F811
    masks = {"bool": torch.rand(1, 1, 40, 70) > 0.5, "float": torch.randn(1, 1, 40, 70)}
    assert_agrees(emulated, 40, 70, masks.get(mask), window(-1, 35, scale))


@pytest.mark.parametrize("masked", [False, True])
def test_scores_that_overflow_are_nan_and_not_zero(emulated, masked):  # noqa: F811
    """Also where only the product with the scale does."""
    kept = torch.ones(1, 1, 20, 40, dtype=torch.bool) if masked else None
    query, key, value = operands(heads=1, queries=20, keys=40, dims=SMALL, dtype=torch.float32)
    key[:, :, 7] = 10 * query[:, :, 3]
    out, lse = emulated.attention_forward(query, key, value, kept, None, None, *PLAIN._replace(scale=3e37))
    assert out[0, 0, 3].isnan().all()
    assert lse[0, 0, 3].isnan()


# --------------------------------------------------------------------------------------------------
# Masks in memory


def laid_out(kind, like):
    """The mask with other strides, in memory that the emulator knows, with nothing readable around it."""
    batch, heads, queries, keys = like.shape
    if kind == "odd address":
        buffer = torch.zeros(like.numel() + 3, dtype=like.dtype)
        view = buffer[3:].view(like.shape)
    elif kind == "odd rows":
        view = torch.zeros(batch, heads, queries, keys + 3, dtype=like.dtype)[..., 3:]
    elif kind == "transposed":
        view = torch.zeros(batch, heads, keys, queries, dtype=like.dtype).mT
    elif kind == "every other key":
        view = torch.zeros(batch, heads, queries, 2 * keys, dtype=like.dtype)[..., ::2]
    elif kind == "one row":
        return like[:, :, :1].clone().expand(like.shape)
    else:
        return like[..., :1].clone().expand(like.shape)
    view.copy_(like)
    return view


LAID_OUT = [
    ["odd address", "odd rows", "transposed", "every other key", "one row", "one column"],
    [torch.bool, torch.float32, torch.float16],
    [*TOLERANCE],
]


@pytest.mark.parametrize(("kind", "mask_dtype", "dtype"), covering(LAID_OUT, lambda point: True), ids=str)
def test_masks_are_read_in_place_whatever_their_strides(emulated, kind, mask_dtype, dtype):  # noqa: F811
    queries, keys = 45, 77
    allowed = torch.rand(1, 2, queries, keys) > 0.4
    like = allowed if mask_dtype == torch.bool else torch.randn(allowed.shape)
    if like.is_floating_point() and kind != "odd address":  # whose mask has a tangent
        like.masked_fill_(~allowed, -math.inf)
    options = window(-1, 40) if kind == "odd rows" else PLAIN
    mask = laid_out(kind, like.to(mask_dtype))
    assert_agrees(emulated, queries, keys, mask, options, dtype, heads=2, derivatives=2 if kind == "odd address" else 1)


@pytest.mark.parametrize("length", BOUNDARIES)
def test_a_boolean_mask_at_the_end_of_a_word(emulated, length):  # noqa: F811
    """One key for each query, which moves through all places."""
    mask = torch.zeros(1, 1, length, length, dtype=torch.bool)
    mask[:, :, torch.arange(length), (torch.arange(length) * 7 + 3) % length] = True
    assert_agrees(emulated, length, length, mask, dtype=torch.float16)
    assert_agrees(emulated, length, length, mask)


def test_the_lowest_floats_do_not_exclude_a_key(emulated):  # noqa: F811
    tensors = operands(heads=1, queries=33, keys=65, dims=SMALL, dtype=torch.float32)
    lowest = torch.full((1, 1, 33, 65), torch.finfo(torch.float32).min)
    out, lse = emulated.attention_forward(*tensors, lowest, None, None, *PLAIN)
    assert lse.isfinite().all()
    assert largest_error(out, tensors[2].mean(2, keepdim=True).expand(out.shape)) < 1e-5
    holes = lowest.clone()
    holes[..., 10] = -math.inf
    out, _ = emulated.attention_forward(*tensors, holes, None, None, *PLAIN)
    kept = torch.arange(65) != 10
    assert largest_error(out, tensors[2][:, :, kept].mean(2, keepdim=True).expand(out.shape)) < 1e-5


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("options", [PLAIN, Options(0.0, -1, 20, 0.3, softcap=0.7)], ids=["plain", "window, softcap"])
def test_keys_that_no_query_attends_to_may_hold_anything(emulated, options, bad):  # noqa: F811
    """A key that one warp attends to and another does not is zero for the second only."""
    tensors = operands(heads=1, queries=70, keys=70, dims=SMALL, dtype=torch.float32)
    mask = torch.rand(1, 1, 70, 70) > 0.3
    mask[..., 5] = False
    mask[:, :, 16:, 12] = False
    mask[:, :, :16, 12] = True
    mask[:, :, 0] = False
    mask[:, :, 0, :3] = True
    clean = [torch.cat([t.float().flatten() for t in gradients(emulated, tensors, mask, None, options)])]
    for tensor in tensors[1:]:
        tensor[:, :, 5] = bad
    got = [torch.cat([t.float().flatten() for t in gradients(emulated, tensors, mask, None, options)])]
    assert torch.equal(*clean, *got)
    tensors[2][:, :, 12] = bad
    out, _ = emulated.attention_forward(*tensors, mask, None, None, *options)
    assert out[:, :, 16:].isfinite().all()
    assert out[:, :, 1:16].isfinite().logical_not().any()
