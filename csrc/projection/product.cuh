// The product that every projection kernel is: a tile of sums over a common index, whose operands pass by in steps,
// copied some steps ahead.
#pragma once

#include "common/tile.cuh"
#include "device/barrier.cuh"
#include "device/copy.cuh"
#include "device/shared.cuh"
#include "projection/config.h"

namespace fastgen::projection {

// The left operand of 16 columns of a tile that has the summed index down.
template <typename T>
__device__ __forceinline__ void load_left_down(uint32_t (&left)[4], const T* corner, int stride) {
  const int lane = threadIdx.x % 32;
  device::ldmatrix_trans(left, corner + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
}
__device__ __forceinline__ void load_left_down(uint32_t (&left)[4], const float* corner, int stride) {
  const int row = lane_row(), t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) left[i] = float_to_bits(corner[(t + i / 2 * 4) * stride + row + i % 2 * 8]);
}

// Two right operands, of columns 0-7 and 8-15 of a tile that has the summed index down.
template <typename T>
__device__ __forceinline__ void load_right_down(uint32_t (&right)[4], const T* corner, int stride) {
  Product<T>::load_down(right, corner, stride);
}
__device__ __forceinline__ void load_right_down(uint32_t (&right)[4], const float* corner, int stride) {
  const int row = lane_row(), t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) right[i] = float_to_bits(corner[(t + i % 2 * 4) * stride + row + i / 2 * 8]);
}

// kExtent rows or columns of an operand, and a step's depth of the summed index: across, or down the tile's rows.
template <typename T, int kExtent, bool kDown>
struct OperandTile {
  static constexpr int kDepth = depth(sizeof(T)), kChunk = 16 / static_cast<int>(sizeof(T));
  static constexpr int kBytes = operand_bytes(kExtent, sizeof(T), kDown);
  static constexpr int kRows = kDown ? kDepth : kExtent;
  using Memory = Tile<T, kDown ? kExtent : kDepth>;
  static constexpr int kStride = Memory::kStride;
  Memory tile;

  // Starts copying; the whole block takes part. source(i, k): where 16 bytes from row or column i and summed index k on
  // are, of which i or k is a whole number of chunks; null: zeros.
  template <int kThreads, typename Source>
  __device__ __forceinline__ void copy(const void* anywhere, Source&& source) const {
    constexpr int kSide = Memory::kColumns / kChunk, kChunks = kRows * kSide;
    static_assert(kChunks % kThreads == 0, "every thread copies as much");
    // Eight lanes write at a time, to different banks: side by side where they fill a row, else below each other.
    constexpr int kLanesDown = kSide < 8 ? 32 / kSide : 1;
#pragma unroll
    for (int i = 0; i < kChunks / kThreads; ++i) {
      const int index = i * kThreads + static_cast<int>(threadIdx.x), lane = index % 32;
      const int row = kSide >= 8 ? index / kSide : index / 32 * kLanesDown + lane % kLanesDown;
      const int column = (kSide >= 8 ? index % kSide : lane / kLanesDown) * kChunk;
      const void* from = kDown ? source(column, row) : source(row, column);
      device::async_copy<16>(tile.at(row, column), from != nullptr ? from : anywhere, from != nullptr ? 16 : 0);
    }
  }
  __device__ __forceinline__ void load_left(uint32_t (&left)[4], int i, int k) const {
    if constexpr (kDown) {
      load_left_down(left, tile.at(k, i), kStride);
    } else {
      fastgen::load_left(left, tile.at(i, k), kStride);
    }
  }
  __device__ __forceinline__ void load_right(uint32_t (&right)[4], int i, int k) const {
    if constexpr (kDown) {
      load_right_down(right, tile.at(k, i), kStride);
    } else {
      load_across(right, tile.at(i, k), kStride);
    }
  }
};

// A warp's share of the tile, in fragments.
template <typename T, int kShapeIndex, bool kLeftDown, bool kRightDown>
struct TileProduct {
  static constexpr Shape kShape = kShapes[kShapeIndex];
  static constexpr int kThreads = kShape.threads();
  static constexpr int kWarpRows = kShape.rows / kShape.warps_down, kWarpColumns = kShape.columns / kShape.warps_across;
  static constexpr int kFragments = kWarpRows / kFragmentRows, kTiles = kWarpColumns / 8;
  using Left = OperandTile<T, kShape.rows, kLeftDown>;
  using Right = OperandTile<T, kShape.columns, kRightDown>;
  static constexpr int kDepth = Left::kDepth;
  float sums[kFragments][kTiles][4] = {};
  int row, column;  // of the warp

  __device__ __forceinline__ TileProduct() {
    const int warp = static_cast<int>(threadIdx.x / 32);
    row = warp / kShape.warps_across * kWarpRows, column = warp % kShape.warps_across * kWarpColumns;
  }
  static __device__ __forceinline__ unsigned char* stage(int step) {
    return device::dynamic_shared() + step % kStages * (Left::kBytes + Right::kBytes);
  }
  static __device__ __forceinline__ Left left(int step) { return {{reinterpret_cast<T*>(stage(step))}}; }
  static __device__ __forceinline__ Right right(int step) {
    return {{reinterpret_cast<T*>(stage(step) + Left::kBytes)}};
  }

  // copy(step) starts the copies of a step; with_left(left operand, fragment) sees each of them. Shared memory is free
  // afterwards.
  template <typename Copy, typename WithLeft>
  __device__ __forceinline__ void run(int64_t first, int64_t steps, bool exact, Copy&& copy, WithLeft&& with_left) {
    using P = Product<T>;
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < steps) copy(first + i, i);
      device::async_copy_commit();
    }
    int number = 0;  // of the stage
    for (int64_t step = 0; step < steps; ++step) {
      device::async_copy_wait<kStages - 2>();
      // This step is there, and everyone is done with the one before, whose stage the next copy takes.
      device::sync_block();
      const int ahead = number + kStages - 1 < kStages ? number + kStages - 1 : number - 1;
      if (step + kStages - 1 < steps) copy(first + step + kStages - 1, ahead);
      device::async_copy_commit();
      const Left a = left(number);
      const Right b = right(number);
#pragma unroll
      for (int k = 0; k < kDepth; k += P::kDepth) {
        uint32_t rows[kFragments][4];
#pragma unroll
        for (int m = 0; m < kFragments; ++m) {
          a.load_left(rows[m], row + m * kFragmentRows, k);
          with_left(rows[m], m);
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; tile += 2) {
          uint32_t columns[4];
          b.load_right(columns, column + tile * 8, k);
#pragma unroll
          for (int m = 0; m < kFragments; ++m) {
            P::multiply(sums[m][tile], rows[m], columns, exact);
            P::multiply(sums[m][tile + 1], rows[m], columns + 2, exact);
          }
        }
      }
      number = number + 1 < kStages ? number + 1 : 0;
    }
    // No copy of the last steps is left: what was awaited last was the last.
    device::sync_block();
  }
};

}  // namespace fastgen::projection
