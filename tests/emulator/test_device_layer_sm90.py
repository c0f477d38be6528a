"""The instructions of csrc/device/ that came with sm_90a: tensor copies, products of warpgroups, registers.

As in test_device_layer.py, the same kernels run in the emulator and, where there is one, on a GPU.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator.samples import from_bfloat16, to_bfloat16
from tests.emulator.test_device_layer import device, random_words, run

__all__ = ["device"]  # the fixture

WARPGROUP = (128, 1, 1)


def swizzled(rows):
    """Rows of 64 elements as they lie in shared memory: the chunks of 16 bytes of row r, permuted by r % 8."""
    chunks = rows.reshape(-1, 8, 8)
    chunk = np.arange(8)
    return np.stack([one[chunk ^ (row % 8)] for row, one in enumerate(chunks)]).reshape(rows.shape)


@pytest.mark.parametrize(
    "at",
    [(0, 0, 0, 0), (64, 8, 1, 2), (16, 33, 0, 1), (-8, -3, 1, 1), (48, 30, 2, 2), (96, 40, 0, 0), (0, -16, 0, 0)],
    ids=str,
)
def test_tensor_copies_swizzle_rows_and_fill_with_zeros(device, at):
    tensor = np.random.default_rng(1).integers(1, 2**16, (3, 3, 40, 88)).astype(np.uint16)  # batch, head, row, column
    rows, margin = 16, 96
    padded = np.pad(tensor[at[3], at[2]], margin)
    box = padded[margin + at[1] :, margin + at[0] :][:rows, :64]
    coordinates = np.array(at, np.int32).view(np.uint32)
    shared = rows * 128
    got = run(device, "tensor_load", [tensor, coordinates], rows * 32, (0, rows), WARPGROUP, shared)
    np.testing.assert_array_equal(got.view(np.uint16).reshape(rows, 64), swizzled(box))


@pytest.mark.parametrize(
    ("group", "empty_groups", "overwritten"), [(1, 0, 4), (1, 1, 5), (5, 0, 0), (5, 1, 5)], ids=str
)
@pytest.mark.parametrize("left_out", [0, 6])
def test_tensor_stores_write_what_lies_in_the_tensor(device, left_out, group, empty_groups, overwritten):
    """Boxes inside, clipped at both ends of the rows and of the columns, and outside of the tensor."""
    rng, rows, margin = np.random.default_rng(3), 16, 96
    coordinates = np.array([(16, 5, 0, 1), (64, 30, 2, 2), (-10, -3, 1, 0), (-8, 21, 0, 1), (0, 0, 3, 1)], np.int32)
    boxes = rng.integers(1, 2**16, (len(coordinates), rows, 64)).astype(np.uint16)
    before = rng.integers(1, 2**16, (3, 3, 40, 88)).astype(np.uint16)  # batch, head, row, column
    wanted = before.copy()
    for (column, row, head, batch), box in zip(coordinates, boxes, strict=True):
        if head >= 3:
            continue
        padded = np.pad(before[batch, head], margin)
        padded[margin + row :, margin + column :][:rows, :64] = box
        inside = padded[margin:-margin, margin:-margin]
        mask = np.zeros_like(padded, bool)
        mask[margin + row :, margin + column :][:rows, :64] = True
        mask = mask[margin:-margin, margin:-margin] & (np.arange(88) < 88 - left_out)
        wanted[batch, head][mask] = inside[mask]
    tiles = np.stack([swizzled(box) for box in boxes]).view(np.uint32)
    numbers = (len(boxes), group, empty_groups, overwritten, rows, left_out)
    inputs = [tiles, coordinates.view(np.uint32)]
    shared = boxes.nbytes
    got = run(device, "tensor_store", inputs, None, numbers, WARPGROUP, shared, before)
    np.testing.assert_array_equal(got, wanted)


def test_a_tensor_without_a_map_is_refused(device):
    """A row of 12 bytes."""
    with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled: the tensor has no tensor map"):
        run(device, "tensor_load", [np.zeros((4, 6), np.uint16), random_words(4)], 32, (0, 1), WARPGROUP, 128)


@pytest.mark.parametrize("values", ["integers", "normal"])
@pytest.mark.parametrize(
    ("columns", "left", "rows"),
    [
        *(
            (columns, left, rows)
            for columns in (64, 128)
            for left in ("tile", "registers")
            for rows in ("outer", "depth")
        ),
        *((columns, "tile", "outer") for columns in (80, 96, 160)),
    ],
)
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_products_of_a_warpgroup(device, kind, columns, rows, left, values):
    rng = np.random.default_rng(2)
    draw = rng.standard_normal if values == "normal" else lambda shape: rng.integers(-8, 9, shape)
    a, b = (draw(shape).astype(np.float32) for shape in ((64, 64), (columns, 64)))
    if kind == "f16":
        bits = [one.astype(np.float16).view(np.uint16) for one in (a, b)]
        a, b = (one.view(np.float16).astype(np.float64) for one in bits)
    else:
        bits = [to_bfloat16(one) for one in (a, b)]
        a, b = (from_bfloat16(one).astype(np.float64) for one in bits)
    operands = [bits[0], bits[1] if rows == "outer" else np.ascontiguousarray(bits[1].T)]
    box = columns if rows == "outer" else 64
    shared = 64 * 128 + columns * 128
    name = f"wgmma {kind} {columns} {left} {rows}"
    got = run(device, name, operands, (64, columns), (0, 64, box), WARPGROUP, shared).view(np.float32)
    if values == "integers":
        np.testing.assert_array_equal(got, (a @ b.T).astype(np.float32))
    else:
        np.testing.assert_allclose(got, a @ b.T, rtol=0, atol=1e-4)


def test_warpgroups_exchange_registers(device):
    got = run(device, "registers", [], 256, threads=(256, 1, 1))
    np.testing.assert_array_equal(got, np.arange(256))
