"""The sample kernels of kernels/: their arguments and expected results."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Call(NamedTuple):
    """A launch of a kernel with the common arguments, and its result."""

    blocks: int
    threads: int
    inputs: list[np.ndarray]
    wanted: np.ndarray
    numbers: tuple[int, ...] = ()
    shared_bytes: int = 0
    initial: np.ndarray | None = None
    tolerance: float = 0.0

    def run(self, launch: Any, which: str | int) -> np.ndarray:
        """``launch`` is the module's ``run`` (by name) or ``run_planted`` (by number)."""
        out = np.zeros_like(self.wanted) if self.initial is None else self.initial
        sizes = ((self.blocks, 1, 1), (self.threads, 1, 1), self.shared_bytes)
        return launch(which, *sizes, self.inputs, out, self.initial is not None, list(self.numbers))

    def is_right(self, result: np.ndarray) -> bool:
        return bool(np.allclose(result, self.wanted, rtol=0, atol=self.tolerance))


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits, rounded to nearest even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def reverse() -> Call:
    words = np.random.default_rng(1).integers(0, 2**31, 200).astype(np.uint32)
    wanted = np.concatenate([words[:128][::-1], words[128:][::-1]]) + 1
    return Call(2, 128, [words], wanted, (200,))


def exchange() -> Call:
    words = np.random.default_rng(2).integers(1, 1000, (2, 32)).astype(np.uint32)
    wanted = (2 * np.roll(words, -1, axis=1) + 1 + words.sum(axis=1, keepdims=True)).astype(np.uint32)
    return Call(1, 64, [words], wanted.ravel())


def histogram() -> Call:
    words = np.random.default_rng(3).integers(0, 16, 300).astype(np.uint32)
    words[:2] = 15
    return Call(
        2, 64, [words], np.bincount(words, minlength=16).astype(np.uint32), (300,), initial=np.zeros(16, np.uint32)
    )


def product() -> Call:
    rng, depth = np.random.default_rng(4), 72
    left, right = (rng.integers(-4, 5, shape).astype(np.float16) for shape in ((64, depth), (depth, 64)))
    wanted = left.astype(np.float32) @ right.astype(np.float32)
    return Call(1, 128, [left, right], wanted, (depth,), shared_bytes=2 * (64 * 80 + 32 * 144))


def scratch() -> Call:
    words = np.random.default_rng(5).integers(0, 2**31, 256).astype(np.uint32)
    return Call(1, 64, [words], np.concatenate([0 * words, np.roll(words, -4)]))


def ring() -> Call:
    words = np.random.default_rng(6).integers(0, 2**31, (7, 32)).astype(np.uint32)
    return Call(1, 64, [words], np.ascontiguousarray(words[:, ::-1]), (7,))


def pitfalls() -> Call:
    words = np.random.default_rng(8).integers(1, 2**31, 160).astype(np.uint32)
    wanted = np.concatenate([words[:64], words[32:64]])
    return Call(2, 32, [words], wanted, initial=np.zeros(96, np.uint32))


def attention(keys: int = 512) -> Call:
    rng = np.random.default_rng(7)
    bits = [to_bfloat16(rng.standard_normal((rows, 64))) for rows in (64, keys, keys)]
    query, key, value = (from_bfloat16(one).astype(np.float64) for one in bits)
    weights = np.exp(query @ key.T / 8)
    wanted = (weights / weights.sum(axis=1, keepdims=True) @ value).astype(np.float32)
    # The weights are rounded to 8 bits before they meet the values.
    return Call(1, 128, bits, wanted, (keys,), shared_bytes=5 * 64 * 144, tolerance=4e-3)


def chain() -> Call:
    """Small integers, so that halves hold the scores; values of no key are NaN."""
    rng, keys, rows = np.random.default_rng(9), 150, 160
    query, key = (rng.integers(-1, 2, (n, 64)).astype(np.float16) for n in (64, rows))
    value = rng.integers(-2, 3, (rows, 64)).astype(np.float16)
    value[keys:] = np.nan
    query64, key64, value64 = (one.astype(np.float64) for one in (query, key, value))
    wanted = (query64 @ key64[:keys].T @ value64[:keys]).astype(np.float32)
    return Call(1, 256, [query, key, value], wanted, (keys, 64, 64, 64), shared_bytes=5 * 64 * 128)


def stores() -> Call:
    """The last tile is clipped, and lies in a tensor that lacks the output's last 8 columns."""
    rows = 2 * 4 * 8 - 3
    words = np.random.default_rng(10).integers(0, 2**31, (rows, 32)).astype(np.uint32)
    wanted = np.concatenate([words + 1, words[:, :4] + 1], axis=1, dtype=np.uint32).view(np.uint16)
    numbers = (rows, 8, 0, 0, 8, 8)
    return Call(2, 64, [words.view(np.uint16)], wanted, numbers, shared_bytes=2 * 8 * 128, initial=0 * wanted)


SAMPLES = {
    "reverse": reverse,
    "exchange": exchange,
    "histogram": histogram,
    "product": product,
    "scratch": scratch,
    "named_ring": ring,
    "mbarrier_ring": ring,
    "copy_ring": ring,
    "pitfalls": pitfalls,
    "attention": attention,
    "chain": chain,
    "stores": stores,
}

# The kernels of tricky.cu: blocks, and the block's two dims.
TRICKY = {
    "asks while another spins": (1, (64, 1)),
    "asks many times": (1, (64, 1)),
    "lock": (1, (96, 1)),
    "elected lanes": (1, (64, 1)),
    "leaves and halves": (1, (96, 1)),
    "blocks read alike": (50, (64, 1)),
    "kinds of data": (1, (64, 1)),
    "odd block": (2, (9, 7)),
    "everyone reads": (1, (1024, 1)),
}


def run_tricky(launch: Any, name: str) -> np.ndarray:
    """The output: all ones if correct."""
    blocks, block = TRICKY[name]
    words = np.arange(2000, dtype=np.uint32)
    out = np.zeros(blocks * block[0] * block[1], np.uint32)
    return launch(name, (blocks, 1, 1), (*block, 1), 0, [words], out, False, [])
