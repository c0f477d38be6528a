// The GEMM main loop of the projection kernels: a BLOCK_M x BLOCK_N tile of sums over k, pipelined with cp.async.
//
//   prologue: copy tiles 0 .. kStages - 2
//   for each tile of BLOCK_K
//     wait  sync                      tile i is visible, all warps have left tile i - 1
//     copy tile i + kStages - 1       into the stage of tile i - 1
//     for each k of the tile          load fragments (ldmatrix), multiply (mma)
//
//                    k, BLOCK_K at a time ->                   right operand
//                  +-----+-----+-----+               +--------+--------+
//   BLOCK_M rows   |     |     |     |    x   k |    | BLOCK_N columns |   each of warps_m x warps_n warps owns a part
//                  +-----+-----+-----+               +--------+--------+   of the output in registers
#pragma once

#include "common/tile.cuh"
#include "device/barrier.cuh"
#include "device/copy.cuh"
#include "device/shared.cuh"
#include "projection/tiles.h"

namespace fastgen::projection {

// Left operand fragment of a tile with k along the rows (MN-major).
template <typename T>
__device__ __forceinline__ void load_left_k_rows(uint32_t (&left)[4], const T* corner, int stride) {
  const int lane = threadIdx.x % 32;
  device::ldmatrix_trans(left, corner + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
}
__device__ __forceinline__ void load_left_k_rows(uint32_t (&left)[4], const float* corner, int stride) {
  const int row = lane_row(), t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) left[i] = float_to_bits(corner[(t + i / 2 * 4) * stride + row + i % 2 * 8]);
}

// Right operand fragments of columns 0-7 and 8-15 of a tile with k along the rows (MN-major).
template <typename T>
__device__ __forceinline__ void load_right_k_rows(uint32_t (&right)[4], const T* corner, int stride) {
  Product<T>::load_down(right, corner, stride);
}
__device__ __forceinline__ void load_right_k_rows(uint32_t (&right)[4], const float* corner, int stride) {
  const int row = lane_row(), t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) right[i] = float_to_bits(corner[(t + i % 2 * 4) * stride + row + i / 2 * 8]);
}

// kExtent rows or columns of an operand by BLOCK_K. kKRows: k runs down the rows of the tile (MN-major).
template <typename T, int kExtent, bool kKRows>
struct OperandTile {
  static constexpr int BLOCK_K = block_k(sizeof(T)), kChunk = 16 / static_cast<int>(sizeof(T));
  static constexpr int kBytes = operand_bytes(kExtent, sizeof(T), kKRows);
  static constexpr int kRows = kKRows ? BLOCK_K : kExtent;
  using Memory = Tile<T, kKRows ? kExtent : BLOCK_K>;
  static constexpr int kStride = Memory::kStride;
  Memory tile;

  // Starts the asynchronous copy; called by the whole block. source(i, k): address of 16 bytes from row or column i and
  // k on; null for zeros, where ``anywhere`` is a valid address.
  template <int kThreads, typename Source>
  __device__ __forceinline__ void copy(const void* anywhere, Source&& source) const {
    constexpr int kSide = Memory::kColumns / kChunk, kChunks = kRows * kSide;
    static_assert(kChunks % kThreads == 0, "every thread copies the same number of chunks");
    // Eight lanes write per phase, to different banks: along a row if they fill it, else down the rows.
    constexpr int kLanesDown = kSide < 8 ? 32 / kSide : 1;
#pragma unroll
    for (int i = 0; i < kChunks / kThreads; ++i) {
      const int index = i * kThreads + static_cast<int>(threadIdx.x), lane = index % 32;
      const int row = kSide >= 8 ? index / kSide : index / 32 * kLanesDown + lane % kLanesDown;
      const int column = (kSide >= 8 ? index % kSide : lane / kLanesDown) * kChunk;
      const void* from = kKRows ? source(column, row) : source(row, column);
      device::async_copy<16>(tile.at(row, column), from != nullptr ? from : anywhere, from != nullptr ? 16 : 0);
    }
  }
  __device__ __forceinline__ void load_left(uint32_t (&left)[4], int i, int k) const {
    if constexpr (kKRows) {
      load_left_k_rows(left, tile.at(k, i), kStride);
    } else {
      fastgen::load_left(left, tile.at(i, k), kStride);
    }
  }
  __device__ __forceinline__ void load_right(uint32_t (&right)[4], int i, int k) const {
    if constexpr (kKRows) {
      load_right_k_rows(right, tile.at(k, i), kStride);
    } else {
      load_across(right, tile.at(i, k), kStride);
    }
  }
};

// The accumulators of a warp.
template <typename T, int kTileIndex, bool kLeftKRows, bool kRightKRows>
struct TileProduct {
  static constexpr TileShape kShape = kTileShapes[kTileIndex];
  static constexpr int BLOCK_M = kShape.block_m, BLOCK_N = kShape.block_n;
  static constexpr int kThreads = kShape.threads();
  static constexpr int kWarpRows = BLOCK_M / kShape.warps_m, kWarpColumns = BLOCK_N / kShape.warps_n;
  static constexpr int kFragments = kWarpRows / kFragmentRows, kTiles = kWarpColumns / 8;
  using Left = OperandTile<T, BLOCK_M, kLeftKRows>;
  using Right = OperandTile<T, BLOCK_N, kRightKRows>;
  static constexpr int BLOCK_K = Left::BLOCK_K;
  float sums[kFragments][kTiles][4] = {};
  int row, column;  // of the warp's part

  __device__ __forceinline__ TileProduct() {
    const int warp = static_cast<int>(threadIdx.x / 32);
    row = warp / kShape.warps_n * kWarpRows, column = warp % kShape.warps_n * kWarpColumns;
  }
  static __device__ __forceinline__ unsigned char* stage_data(int stage) {
    return device::dynamic_shared() + stage % kStages * (Left::kBytes + Right::kBytes);
  }
  static __device__ __forceinline__ Left left(int stage) { return {{reinterpret_cast<T*>(stage_data(stage))}}; }
  static __device__ __forceinline__ Right right(int stage) {
    return {{reinterpret_cast<T*>(stage_data(stage) + Left::kBytes)}};
  }

  // copy(tile, stage) starts the copies of a tile; with_left(operand, fragment) is called with each left operand.
  // All copies have completed afterwards; to reuse the shared memory, synchronize the block first.
  template <typename Copy, typename WithLeft>
  __device__ __forceinline__ void run(int64_t first, int64_t tiles, bool exact, Copy&& copy, WithLeft&& with_left) {
    using P = Product<T>;
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < tiles) copy(first + i, i);
      device::async_copy_commit();
    }
    int stage = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      device::async_copy_wait<kStages - 2>();
      device::sync_block();
      const int ahead = stage + kStages - 1 < kStages ? stage + kStages - 1 : stage - 1;
      if (tile + kStages - 1 < tiles) copy(first + tile + kStages - 1, ahead);
      device::async_copy_commit();
      const Left a = left(stage);
      const Right b = right(stage);
#pragma unroll
      for (int k = 0; k < BLOCK_K; k += P::kDepth) {
        uint32_t loaded[4];
        Factor<T> rows[kFragments];
#pragma unroll
        for (int m = 0; m < kFragments; ++m) {
          a.load_left(loaded, row + m * kFragmentRows, k);
          rows[m].set(loaded, exact);
          with_left(rows[m], m);
        }
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
          Factor<T> columns[1];
          b.load_right(loaded, column + n * 8, k);
          columns[0].set(loaded, exact);
          P::multiply(sums, n, rows, columns, exact);
        }
      }
      stage = stage + 1 < kStages ? stage + 1 : 0;
    }
  }
};

}  // namespace fastgen::projection
