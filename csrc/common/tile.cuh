// Tiles in shared memory, and the fragments that matrix instructions take from them.
//
// A fragment of a sum is float[4] of a 16 x 8 part: lane 4g + t has (g, 2t), (g, 2t + 1), (g + 8, 2t) and
// (g + 8, 2t + 1), as in device/mma.cuh.
#pragma once

#include "common/tiling.h"
#include "device/convert.cuh"
#include "device/mma.cuh"

namespace fastgen {

// Where a lane's elements are in a fragment.
__device__ __forceinline__ int lane_row() { return threadIdx.x % 32 / 4; }
__device__ __forceinline__ int lane_column() { return threadIdx.x % 4 * 2; }

// Eight rows of a tile, 16 bytes each, lie in different banks: the stride is an odd number of 16 bytes.
template <typename T, int kWidth>
struct Tile {
  static constexpr int kColumns = kWidth;
  static constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  static constexpr int kStride = row_bytes(kColumns, sizeof(T)) / static_cast<int>(sizeof(T));
  static_assert(kColumns % (2 * kChunk) == 0, "a row is an even number of 16 bytes");

  T* data;

  __device__ __forceinline__ T* at(int row, int column) const { return data + row * kStride + column; }
  // The 16 bytes between two rows are free for four floats that belong to the row.
  __device__ __forceinline__ float* beside(int row) const { return reinterpret_cast<float*>(at(row, kColumns)); }
};

// How T is multiplied. kDepth: elements summed by one product of a 16 x kDepth left and a kDepth x 8 right operand,
// which have four registers and two.
//
// Fragments of scores become left operands as they are: the order of the rows within kDepth is the right operand's
// affair (load_down).
template <typename T>
struct Product {
  static constexpr int kDepth = 16;

  static __device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&left)[4], const uint32_t* right,
                                                  bool /*exact*/) {
    const uint32_t operand[2] = {right[0], right[1]};
    device::mma_m16n8k16<T>(sum, left, operand);
  }
  // The left operand from kDepth / 8 fragments of scores.
  static __device__ __forceinline__ void from_scores(uint32_t (&left)[4], const float (*scores)[4]) {
    left[0] = device::pack<T>(scores[0][0], scores[0][1]), left[1] = device::pack<T>(scores[0][2], scores[0][3]);
    left[2] = device::pack<T>(scores[1][0], scores[1][1]), left[3] = device::pack<T>(scores[1][2], scores[1][3]);
  }
  // Two right operands, of columns 0-7 and 8-15, from kDepth rows of a tile that has the summed index down.
  static __device__ __forceinline__ void load_down(uint32_t (&right)[4], const T* corner, int stride) {
    const int lane = threadIdx.x % 32;
    device::ldmatrix_trans(right, corner + lane % 16 * stride + lane / 16 * 8);
  }
  // Zeros in the rows of those operands whose bit is not set: bits 2 i and 2 i + 1 are of this lane's rows in the i-th
  // eight of them.
  static __device__ __forceinline__ void keep_rows(uint32_t (&right)[4], uint32_t bits) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t two = bits >> i % 2 * 2;
      right[i] &= ((two & 1u) != 0 ? 0x0000ffffu : 0u) | ((two & 2u) != 0 ? 0xffff0000u : 0u);
    }
  }
};

// float32 as a sum of two tf32 numbers, high + low: three products, and low times low would be below float32.
template <>
struct Product<float> {
  static constexpr int kDepth = 8;

  static __device__ __forceinline__ uint32_t low_part(uint32_t bits, uint32_t high) {
    return device::to_tf32(bits_to_float(bits) - bits_to_float(high));
  }
  static __device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&left)[4], const uint32_t* right,
                                                  bool exact) {
    uint32_t left_high[4], right_high[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) left_high[i] = device::to_tf32(bits_to_float(left[i]));
#pragma unroll
    for (int i = 0; i < 2; ++i) right_high[i] = device::to_tf32(bits_to_float(right[i]));
    if (exact) {
      uint32_t left_low[4], right_low[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) left_low[i] = low_part(left[i], left_high[i]);
#pragma unroll
      for (int i = 0; i < 2; ++i) right_low[i] = low_part(right[i], right_high[i]);
      device::mma_m16n8k8_tf32(sum, left_low, right_high);
      device::mma_m16n8k8_tf32(sum, left_high, right_low);
    }
    device::mma_m16n8k8_tf32(sum, left_high, right_high);
  }
  // Columns 2t and 2t + 1 of the scores stand where t and t + 4 would: load_down takes the rows in that order.
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

// The left operand of 16 rows of a tile that has the summed index across.
template <typename T>
__device__ __forceinline__ void load_left(uint32_t (&left)[4], const T* corner, int stride) {
  const int lane = threadIdx.x % 32;
  device::ldmatrix(left, corner + lane % 16 * stride + lane / 16 * (Product<T>::kDepth / 2));
}

// Two right operands, of rows 0-7 and 8-15 of a tile that has the summed index across.
template <typename T>
__device__ __forceinline__ void load_across(uint32_t (&right)[4], const T* corner, int stride) {
  const int lane = threadIdx.x % 32;
  device::ldmatrix(right, corner + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * (Product<T>::kDepth / 2));
}

// Two right operands, of the same 8 rows and two depths, one after the other.
template <typename T>
__device__ __forceinline__ void load_across_deep(uint32_t (&right)[4], const T* corner, int stride) {
  const int lane = threadIdx.x % 32;
  device::ldmatrix(right, corner + lane % 8 * stride + lane / 8 * (Product<T>::kDepth / 2));
}

}  // namespace fastgen
