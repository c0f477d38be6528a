// Copies of tiles from global to shared memory, and products of tiles.
#pragma once

#include "attention/tiles.h"
#include "common/tile.cuh"
#include "device/copy.cuh"
#include "device/warp.cuh"

namespace fastgen::attention {

// The index of the warp, from one lane: the compiler knows then that branches on it do not diverge, and does not keep
// what depends on it in registers over a loop.
__device__ __forceinline__ int uniform_warp() { return device::shuffle(static_cast<int>(threadIdx.x / 32), 0); }

// The 16-byte chunks of a tile's rows that a thread copies: columns ``column()`` + i * kSide * kChunk of the rows from
// row() on in steps of step().
template <typename T, int kWidth>
struct Chunks {
  static constexpr int kChunk = Tile<T, kWidth>::kChunk, kChunks = kWidth / kChunk;
  // Lanes along a row: the largest power of two that divides its number of chunks.
  static constexpr int kSide = (kChunks & -kChunks) < 32 ? kChunks & -kChunks : 32, kDown = 32 / kSide;

  // Eight lanes write per phase, to different banks: along a row if they fill it, else down the rows.
  static __device__ __forceinline__ int row() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    return warp * kDown + (kSide >= 8 ? lane / kSide : lane % kDown);
  }
  static __device__ __forceinline__ int column() {
    const int lane = threadIdx.x % 32;
    return (kSide >= 8 ? lane % kSide : lane / kDown) * kChunk;
  }
  static __device__ __forceinline__ int step() { return static_cast<int>(blockDim.x / 32) * kDown; }

  // The chunks of one row; ``target`` and ``source`` are at the first of them.
  static __device__ __forceinline__ void copy(T* target, const T* source, bool valid, int columns) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += kSide) {
      device::async_copy<16>(target + chunk * kChunk, source + chunk * kChunk,
                             valid && column() + chunk * kChunk < columns ? 16 : 0);
    }
  }
};

// Starts the asynchronous copy of ``rows`` rows of ``columns`` elements, padded with zeros to kWidth; rows for which
// is_valid(row) is false are zeros. Called by the whole block, which has to commit and wait.
//
// All threads make the same number of steps here and in TileSource. Where a thread's own row ended the loop, ptxas took
// warps for divergent in the rest of the kernel: shuffles and barriers got a second, divergent version, a third of all
// instructions.
// kOwnSteps: each thread has its own number of steps all the same, which takes a register less.
template <bool kOwnSteps = false, typename T, int kWidth, typename IsValid>
__device__ __forceinline__ void copy_rows(const Tile<T, kWidth>& tile, int rows, const T* source, int64_t stride,
                                          int columns, IsValid&& is_valid) {
  using C = Chunks<T, kWidth>;
  const int64_t advance = C::step() * stride;
  const T* from = source + C::row() * stride + C::column();
  if constexpr (kOwnSteps) {
#pragma unroll 1
    for (int row = C::row(); row < rows; row += C::step(), from += advance) {
      C::copy(tile.at(row, C::column()), from, is_valid(row), columns);
    }
    return;
  }
#pragma unroll 1
  for (int first = 0; first < rows; first += C::step(), from += advance) {
    const int row = first + C::row();
    if (row < rows) C::copy(tile.at(row, C::column()), from, is_valid(row), columns);
  }
}

// An operand of which a block copies one tile of kRows rows after the other. A thread keeps the address of its first
// chunk, so that a tile costs one product of row and stride, and a row one addition. kWarps: of the largest block.
template <typename T, int kWidth, int kRows, int kWarps>
struct TileSource {
  using C = Chunks<T, kWidth>;
  const T* first;
  int64_t stride;
  int columns;

  // ``operand``: its row 0.
  __device__ __forceinline__ TileSource(const T* operand, int64_t stride, int columns)
      : first(operand + C::row() * stride + C::column()), stride(stride), columns(columns) {}

  // copy_rows from row 0 + ``offset`` elements on. ``all``: whether is_valid is true for all rows.
  template <typename IsValid>
  __device__ __forceinline__ void copy(const Tile<T, kWidth>& tile, int64_t offset, bool all,
                                       IsValid&& is_valid) const {
    constexpr int kStep = kWarps * C::kDown;
    const T* from = first + offset;
    T* target = tile.at(C::row(), C::column());
    if (all && blockDim.x == 32 * kWarps) {
#pragma unroll
      for (int down = 0; down < kRows; down += kStep, from += kStep * stride) {
        if (kRows % kStep == 0 || C::row() + down < kRows) {
          C::copy(target + down * Tile<T, kWidth>::kStride, from, true, columns);
        }
      }
    } else {
      const int64_t advance = C::step() * stride;
#pragma unroll 1
      for (int first_row = 0; first_row < kRows; first_row += C::step(), from += advance) {
        const int at = first_row + C::row();
        if (at < kRows) C::copy(tile.at(at, C::column()), from, is_valid(at), columns);
      }
    }
  }
};

// Steps of a product that are unrolled: six without a remainder; fewer in float32, where a step has three times as many
// matrix instructions; one in products that are rare, for the build time.
template <typename T, bool kRare, int kDepths>
constexpr int kDepthsUnrolled = kRare            ? 1
                                : sizeof(T) == 4 ? 2
                                : kDepths == 6   ? 6
                                                 : 4;

// S += A B^T: kFragments * 16 rows of ``left`` starting at ``row``, 8 kTiles rows of ``right``.
template <bool kRare = false, typename T, int kWidth, int kFragments, int kTiles>
__device__ __forceinline__ void multiply_rows(float (&scores)[kFragments][kTiles][4], const Tile<T, kWidth>& left,
                                              int row, const Tile<T, kWidth>& right, bool exact) {
  using P = Product<T>;
  constexpr int kStride = Tile<T, kWidth>::kStride;
  uint32_t loaded[4];
  const auto load = [&](Factor<T>& a, int m, int k) {
    load_left(loaded, left.at(row + m * kFragmentRows, k), kStride);
    a.set(loaded, exact);
  };
  if constexpr (kTiles == 1) {
#pragma unroll 1
    for (int k = 0; k < kWidth; k += 2 * P::kDepth) {
      Factor<T> b;
      load_across_deep(loaded, right.at(0, k), kStride);
      b.set(loaded, exact);
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
#pragma unroll
        for (int deep = 0; deep < 2; ++deep) {
          Factor<T> a;
          load(a, m, k + deep * P::kDepth);
          P::multiply(scores[m][0], a, b, deep, exact);
        }
      }
    }
  } else {
    constexpr int kGroup = smaller(P::kGroup, kTiles), kUnrolled = kDepthsUnrolled<T, kRare, kWidth / P::kDepth>;
#pragma unroll(kUnrolled)
    for (int k = 0; k < kWidth; k += P::kDepth) {
      if (kFragments > 1) device::hold_loads();
      Factor<T> a[kFragments];
#pragma unroll
      for (int m = 0; m < kFragments; ++m) load(a[m], m, k);
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += kGroup) {
        Factor<T> b[kGroup / 2];
#pragma unroll
        for (int i = 0; i < kGroup / 2; ++i) {
          load_across(loaded, right.at((tile + 2 * i) * 8, k), kStride);
          b[i].set(loaded, exact);
        }
        P::multiply(scores, tile, a, b, exact);
      }
    }
  }
}

// The left operands of O += P V, from weights in registers.
template <typename T, int kFragments, int kTiles>
struct Weights {
  static constexpr int kDepths = kTiles * 8 / Product<T>::kDepth;
  uint32_t left[kDepths][kFragments][4];
};

// O += P V. With kSelected, rows of ``right`` whose bit in ``live`` is 0 are treated as zeros.
template <bool kSelected, typename T, int kWidth, int kFragments, int kTiles, int kColumnTiles>
__device__ __forceinline__ void multiply_rows_of(float (&sums)[kFragments][kColumnTiles][4],
                                                 const Weights<T, kFragments, kTiles>& weights,
                                                 const Tile<T, kWidth>& right, int column, bool exact, uint32_t live) {
  using P = Product<T>;
  constexpr int kStride = Tile<T, kWidth>::kStride, kDepths = Weights<T, kFragments, kTiles>::kDepths;
  const auto load = [&](uint32_t (&b)[4], int k, int tile) {
    P::load_down(b, right.at(k * P::kDepth, column + tile * 8), kStride);
    if constexpr (kSelected) P::keep_rows(b, live >> k * P::kDepth / 4);
  };
  if constexpr (sizeof(T) == 4) {
    constexpr int kGroup = smaller(P::kGroup, kColumnTiles);
#pragma unroll
    for (int k = 0; k < kDepths; ++k) {
      Factor<T> a[kFragments];
#pragma unroll
      for (int m = 0; m < kFragments; ++m) a[m].set(weights.left[k][m], exact);
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; tile += kGroup) {
        Factor<T> b[kGroup / 2];
#pragma unroll
        for (int i = 0; i < kGroup / 2; ++i) {
          uint32_t loaded[4];
          load(loaded, k, tile + 2 * i);
          b[i].set(loaded, exact);
        }
        P::multiply(sums, tile, a, b, exact);
      }
    }
  } else {
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; tile += 2) {
      if (kFragments * kColumnTiles > 16) device::hold_loads();
#pragma unroll
      for (int k = 0; k < kDepths; ++k) {
        uint32_t b[4];
        load(b, k, tile);
#pragma unroll
        for (int m = 0; m < kFragments; ++m) {
          P::multiply(sums[m][tile], weights.left[k][m], b, exact);
          P::multiply(sums[m][tile + 1], weights.left[k][m], b + 2, exact);
        }
      }
    }
  }
}

// O += P V: weights in registers, columns of ``right`` starting at ``column``. With ``masked``, rows of ``right`` whose
// bit in ``live`` is 0 are treated as zeros, because 0 * inf and 0 * NaN are not 0; bits 2 i and 2 i + 1 are those of
// this lane's rows in the i-th group of eight. kRare: in float32, one product for both cases, for the build time.
template <typename T, bool kRare = false, int kWidth, int kFragments, int kTiles, int kColumnTiles>
__device__ __forceinline__ void multiply_weights(float (&sums)[kFragments][kColumnTiles][4],
                                                 const float (&weights)[kFragments][kTiles][4],
                                                 const Tile<T, kWidth>& right, int column, bool exact, bool masked,
                                                 uint32_t live) {
  using P = Product<T>;
  constexpr uint32_t kAll = ~0u >> (32 - 2 * kTiles);
  Weights<T, kFragments, kTiles> left;
#pragma unroll
  for (int k = 0; k < left.kDepths; ++k) {
#pragma unroll
    for (int m = 0; m < kFragments; ++m) P::from_scores(left.left[k][m], weights[m] + k * P::kDepth / 8);
  }
  if constexpr (kRare && sizeof(T) == 4) {
    multiply_rows_of<true>(sums, left, right, column, exact, masked ? live : kAll);
  } else if (masked && device::any_lane((live & kAll) != kAll)) {
    multiply_rows_of<true>(sums, left, right, column, exact, live);
  } else {
    multiply_rows_of<false>(sums, left, right, column, exact, live);
  }
}

}  // namespace fastgen::attention
