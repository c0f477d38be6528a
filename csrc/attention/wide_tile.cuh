// Weights of a tile in shared memory, computed 16 x 16 by each warp, the left operand of all warps.
#pragma once

#include "attention/tile.cuh"
#include "device/barrier.cuh"

namespace fastgen::attention {

// S += A B^T over ``kDepth`` columns of both from ``depth`` on: kFragments * 16 rows of ``left`` starting at ``row``, 8
// kTiles rows of ``right`` starting at ``right_row``.
template <int kDepth, typename T, int kWidth, int kFragments, int kTiles>
__device__ __forceinline__ void multiply_depth(float (&scores)[kFragments][kTiles][4], const Tile<T, kWidth>& left,
                                               int row, const Tile<T, kWidth>& right, int right_row, int depth) {
  using P = Product<T>;
  constexpr int kStride = Tile<T, kWidth>::kStride;
#pragma unroll 4
  for (int k = depth; k < depth + kDepth; k += P::kDepth) {
    uint32_t a[kFragments][4];
#pragma unroll
    for (int m = 0; m < kFragments; ++m) load_left(a[m], left.at(row + m * kFragmentRows, k), kStride);
#pragma unroll
    for (int tile = 0; tile < kTiles; tile += 2) {
      uint32_t b[4];
      load_across(b, right.at(right_row + tile * 8, k), kStride);
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
        P::multiply(scores[m][tile], a[m], b, true);
        P::multiply(scores[m][tile + 1], a[m], b + 2, true);
      }
    }
  }
}

// Two warps that have partial sums of the same two fragments: each receives the other's of fragment ``own``, which it
// keeps. ``mine``, ``theirs``: kTiles * 4 * 32 floats in shared memory.
template <int kTiles>
__device__ __forceinline__ void exchange_halves(float (&sum)[1][kTiles][4], const float (&parts)[2][kTiles][4], int own,
                                                float* mine, const float* theirs, int barrier) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) mine[(n * 4 + i) * 32 + lane] = own == 0 ? parts[1][n][i] : parts[0][n][i];
  }
  device::sync_named(barrier, 64);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float kept = own == 0 ? parts[0][n][i] : parts[1][n][i], received = theirs[(n * 4 + i) * 32 + lane];
      sum[0][n][i] = kept + received;
    }
  }
}

template <typename T, int kWidth, int kTiles>
__device__ __forceinline__ void store_weights(const Tile<T, kWidth>& tile, int row, int column,
                                              const float (&weights)[1][kTiles][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      T* const to = tile.at(row + half * 8 + lane_row(), column + n * 8 + lane_column());
      *reinterpret_cast<uint32_t*>(to) = device::pack<T>(weights[0][n][2 * half], weights[0][n][2 * half + 1]);
    }
  }
}

// Which columns of the tile any row attends to: a word for each warp that computes scores, and lane of a row.
// ``columns``: Visible::columns() of 16 columns.
__device__ __forceinline__ void store_live(uint32_t* words, int warp, uint32_t columns) {
  if (lane_row() == 0) words[warp * 4 + lane_column() / 2] = columns;
}
// Of all columns, from kFragments warps for each 16 of them: as multiply_weights takes it.
template <int kFragments, int kParts>
__device__ __forceinline__ uint32_t load_live(const uint32_t* words) {
  uint32_t live = 0;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int i = 0; i < kFragments; ++i) live |= words[(part * kFragments + i) * 4 + lane_column() / 2] << part * 4;
  }
  return live;
}

// O += P V: all rows of ``weights``, columns of ``right`` starting at ``column``. ``live``: as in multiply_weights.
template <typename T, int kKeys, int kWidth, int kFragments, int kColumnTiles>
__device__ __forceinline__ void multiply_shared_weights(float (&sums)[kFragments][kColumnTiles][4],
                                                        const Tile<T, kKeys>& weights, const Tile<T, kWidth>& right,
                                                        int column, bool masked, uint32_t live) {
  using P = Product<T>;
#pragma unroll
  for (int k = 0; k < kKeys; k += P::kDepth) {
    uint32_t a[kFragments][4];
#pragma unroll
    for (int m = 0; m < kFragments; ++m) load_left(a[m], weights.at(m * kFragmentRows, k), Tile<T, kKeys>::kStride);
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; tile += 2) {
      uint32_t b[4];
      P::load_down(b, right.at(k, column + tile * 8), Tile<T, kWidth>::kStride);
      if (masked) P::keep_rows(b, live >> k / 4);
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
        P::multiply(sums[m][tile], a[m], b, true);
        P::multiply(sums[m][tile + 1], a[m], b + 2, true);
      }
    }
  }
}

}  // namespace fastgen::attention
