// Tiles in shared memory, and fragments of mma instructions.
//
// An accumulator fragment is float[4] of a 16 x 8 part: lane 4g + t has (g, 2t), (g, 2t + 1), (g + 8, 2t) and
// (g + 8, 2t + 1), as in device/mma.cuh.
#pragma once

#include <cmath>

#include "common/tiling.h"
#include "device/convert.cuh"
#include "device/mma.cuh"

namespace fastgen {

// Row and column of a lane's first element in an accumulator fragment.
__device__ __forceinline__ int lane_row() { return threadIdx.x % 32 / 4; }
__device__ __forceinline__ int lane_column() { return threadIdx.x % 4 * 2; }

// Row-major tile whose stride is an odd multiple of 16 bytes: ldmatrix of eight rows has no bank conflicts.
template <typename T, int kWidth>
struct Tile {
  static constexpr int kColumns = kWidth;
  static constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  static constexpr int kStride = row_bytes(kColumns, sizeof(T)) / static_cast<int>(sizeof(T));
  static_assert(kColumns % (2 * kChunk) == 0, "a row is an even number of 16-byte chunks");

  T* data;

  __device__ __forceinline__ T* at(int row, int column) const { return data + row * kStride + column; }
  // The 16 bytes of padding after a row, which hold up to four floats per row (logsumexp, delta, ...).
  __device__ __forceinline__ float* row_extra(int row) const { return reinterpret_cast<float*>(at(row, kColumns)); }
};

// The mma of a storage type: 16 x kDepth left operand (four registers) times kDepth x 8 right operand (two registers).
//
// Accumulator fragments are reused as left operands without shuffles; load_down permutes the rows of the right operand
// accordingly.
template <typename T>
struct Product {
  static constexpr int kDepth = 16;

  static __device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&left)[4], const uint32_t* right,
                                                  bool /*exact*/) {
    const uint32_t operand[2] = {right[0], right[1]};
    device::mma_m16n8k16<T>(sum, left, operand);
  }
  // The left operand from kDepth / 8 accumulator fragments.
  static __device__ __forceinline__ void from_scores(uint32_t (&left)[4], const float (*scores)[4]) {
    left[0] = device::pack<T>(scores[0][0], scores[0][1]), left[1] = device::pack<T>(scores[0][2], scores[0][3]);
    left[2] = device::pack<T>(scores[1][0], scores[1][1]), left[3] = device::pack<T>(scores[1][2], scores[1][3]);
  }
  // Right operands of columns 0-7 and 8-15, from kDepth rows of a tile with k along its rows (MN-major).
  static __device__ __forceinline__ void load_down(uint32_t (&right)[4], const T* corner, int stride) {
    const int lane = threadIdx.x % 32;
    device::ldmatrix_trans(right, corner + lane % 16 * stride + lane / 16 * 8);
  }
  // Zeroes the rows of these operands whose bit is 0: bits 2 i and 2 i + 1 are those of this lane's rows in the i-th
  // group of eight.
  static __device__ __forceinline__ void keep_rows(uint32_t (&right)[4], uint32_t bits) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t two = bits >> i % 2 * 2;
      right[i] &= ((two & 1u) != 0 ? 0x0000ffffu : 0u) | ((two & 2u) != 0 ? 0xffff0000u : 0u);
    }
  }
};

// float32 as high + low in tf32 (3xTF32): low * low is below float32 precision and omitted.
//
// The instruction truncates what it adds to the accumulator (Fasi, Higham, Mikaitis, Pranesh, 2021), always toward
// zero, so that over a long sum the error grows with its length. Products of one step are therefore summed from zero,
// and added to the accumulator by an addition that rounds to nearest.
template <>
struct Product<float> {
  static constexpr int kDepth = 8;

  // high: to nearest, ties away from zero; low: the rest, of which the instruction ignores the last bit. Where high
  // would be infinite (inf, NaN, the largest floats) it is 2 with the sign of the value, and low has the value:
  // inf - inf is NaN, and so would be 0 * inf in the product with the low part of the other operand.
  static __device__ __forceinline__ void split(uint32_t bits, uint32_t& high, uint32_t& low) {
    constexpr uint32_t kHalfUnit = 0x1000u, kTf32 = 0xffffe000u, kSignAndTwo = 0xc0000000u, kOverflows = 0x7f7ff000u;
    const float value = bits_to_float(bits);
    const uint32_t kept = fabsf(value) < bits_to_float(kOverflows) ? kTf32 : kSignAndTwo;
    high = (bits + kHalfUnit) & kept;
    low = float_to_bits(value - bits_to_float(high));
  }
  static __device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&left)[4], const uint32_t* right,
                                                  bool exact) {
    uint32_t left_high[4], right_high[2];
    if (exact) {
      uint32_t left_low[4], right_low[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) split(left[i], left_high[i], left_low[i]);
#pragma unroll
      for (int i = 0; i < 2; ++i) split(right[i], right_high[i], right_low[i]);
      float part[4] = {};
      device::mma_m16n8k8_tf32(part, left_low, right_high);
      device::mma_m16n8k8_tf32(part, left_high, right_low);
      device::mma_m16n8k8_tf32(part, left_high, right_high);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += part[i];
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) left_high[i] = device::to_tf32(bits_to_float(left[i]));
#pragma unroll
      for (int i = 0; i < 2; ++i) right_high[i] = device::to_tf32(bits_to_float(right[i]));
      device::mma_m16n8k8_tf32(sum, left_high, right_high);
    }
  }
  // Columns 2t and 2t + 1 of the accumulator take the places of t and t + 4: load_down uses the same permutation.
  static __device__ __forceinline__ void from_scores(uint32_t (&left)[4], const float (*scores)[4]) {
    left[0] = float_to_bits(scores[0][0]), left[1] = float_to_bits(scores[0][2]);
    left[2] = float_to_bits(scores[0][1]), left[3] = float_to_bits(scores[0][3]);
  }
  static __device__ __forceinline__ void load_down(uint32_t (&right)[4], const float* corner, int stride) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      right[i] = float_to_bits(corner[(lane_column() + i % 2) * stride + lane_row() + i / 2 * 8]);
    }
  }
  static __device__ __forceinline__ void keep_rows(uint32_t (&right)[4], uint32_t bits) {
#pragma unroll
    for (int i = 0; i < 4; ++i) right[i] = (bits >> i % 2 & 1u) != 0 ? right[i] : 0u;
  }
};

// Left operand of 16 rows of a K-major tile.
template <typename T>
__device__ __forceinline__ void load_left(uint32_t (&left)[4], const T* corner, int stride) {
  const int lane = threadIdx.x % 32;
  device::ldmatrix(left, corner + lane % 16 * stride + lane / 16 * (Product<T>::kDepth / 2));
}

// Right operands of rows 0-7 and 8-15 of a K-major tile.
template <typename T>
__device__ __forceinline__ void load_across(uint32_t (&right)[4], const T* corner, int stride) {
  const int lane = threadIdx.x % 32;
  device::ldmatrix(right, corner + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * (Product<T>::kDepth / 2));
}

// Right operands of 8 rows of a K-major tile, for two consecutive k steps.
template <typename T>
__device__ __forceinline__ void load_across_deep(uint32_t (&right)[4], const T* corner, int stride) {
  const int lane = threadIdx.x % 32;
  device::ldmatrix(right, corner + lane % 8 * stride + lane / 8 * (Product<T>::kDepth / 2));
}

}  // namespace fastgen
