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

// Four registers of an operand as products take them, made once for all products with the operand. ``exact``: see
// Product<float>.
template <typename T>
struct Factor {
  uint32_t bits[4];

  __device__ __forceinline__ void set(const uint32_t (&loaded)[4], bool /*exact*/) {
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = loaded[i];
  }
};

// The mma of a storage type: 16 x kDepth left operand (four registers) times kDepth x 8 right operand (two registers).
//
// Accumulator fragments are reused as left operands without shuffles; load_down permutes the rows of the right operand
// accordingly.
template <typename T>
struct Product {
  static constexpr int kDepth = 16, kGroup = 2;  // kGroup: tiles of 8 columns that multiply() takes, at most

  // sums[m][first + i] += left[m] * tile i of ``right``, of which each element has two.
  template <int kFragments, int kTiles, int kPairs>
  static __device__ __forceinline__ void multiply(float (&sums)[kFragments][kTiles][4], int first,
                                                  const Factor<T> (&left)[kFragments], const Factor<T> (&right)[kPairs],
                                                  bool exact) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
        multiply(sums[m][first + 2 * i], left[m].bits, right[i].bits, exact);
        multiply(sums[m][first + 2 * i + 1], left[m].bits, right[i].bits + 2, exact);
      }
    }
  }
  // One tile: the first one of ``right``, or the second one.
  static __device__ __forceinline__ void multiply(float (&sum)[4], const Factor<T>& left, const Factor<T>& right,
                                                  int second, bool exact) {
    multiply(sum, left.bits, right.bits + 2 * second, exact);
  }
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

// float32 as high + low in tf32.
template <>
struct Factor<float> {
  uint32_t high[4], low[4];

  // high: to nearest, ties away from zero; low: the rest, of which the instruction ignores the last bit. Where high
  // would be infinite (inf, NaN, the largest floats) it is 2 with the sign of the value, and low has the value:
  // inf - inf is NaN, and so would be 0 * inf in the product with the low part of the other operand. Without low, in
  // tf32, high is the value.
  __device__ __forceinline__ void set(const uint32_t (&loaded)[4], bool exact) {
    constexpr uint32_t kHalfUnit = 0x1000u, kTf32 = 0xffffe000u, kSignAndTwo = 0xc0000000u, kOverflows = 0x7f7ff000u;
    const uint32_t kept = exact ? kSignAndTwo : ~0u;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = bits_to_float(loaded[i]);
      high[i] = (loaded[i] + kHalfUnit) & kTf32;
      if (!(fabsf(value) < bits_to_float(kOverflows))) high[i] = loaded[i] & kept;
      low[i] = float_to_bits(value - bits_to_float(high[i]));
    }
  }
};

// ``exact``: products with float32 accuracy (3xTF32; low * low is below it and omitted), else in tf32.
//
// The instruction truncates what it adds to the accumulator (Fasi, Higham, Mikaitis, Pranesh, 2021), always toward
// zero, so that over a long sum the error grows with its length. Exact products of one step are therefore summed from
// zero, and added to the accumulator by an addition that rounds to nearest.
//
// There is one branch on ``exact`` for a group of products: with a branch in each product, the three instructions of
// one, which wait for each other, would not overlap with those of another.
template <>
struct Product<float> {
  static constexpr int kDepth = 8, kGroup = 4;

  template <int kFragments, int kTiles, int kPairs>
  static __device__ __forceinline__ void multiply(float (&sums)[kFragments][kTiles][4], int first,
                                                  const Factor<float> (&left)[kFragments],
                                                  const Factor<float> (&right)[kPairs], bool exact) {
    using Registers = uint32_t (Factor<float>::*)[4];
    constexpr Registers kHigh = &Factor<float>::high, kLow = &Factor<float>::low;
    const auto for_all = [&](auto&& body) {
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
#pragma unroll
        for (int i = 0; i < 2 * kPairs; ++i) body(m, i);
      }
    };
    const auto add = [&](float (&sum)[4], int m, int i, Registers of_left, Registers of_right) {
      const uint32_t* b = right[i / 2].*of_right + i % 2 * 2;
      const uint32_t operand[2] = {b[0], b[1]};
      device::mma_m16n8k8_tf32(sum, left[m].*of_left, operand);
    };
    if (!exact) {
      for_all([&](int m, int i) { add(sums[m][first + i], m, i, kHigh, kHigh); });
      return;
    }
    float parts[kFragments][2 * kPairs][4] = {};
    for_all([&](int m, int i) { add(parts[m][i], m, i, kLow, kHigh); });
    for_all([&](int m, int i) { add(parts[m][i], m, i, kHigh, kLow); });
    for_all([&](int m, int i) { add(parts[m][i], m, i, kHigh, kHigh); });
    for_all([&](int m, int i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[m][first + i][e] += parts[m][i][e];
    });
  }
  static __device__ __forceinline__ void multiply(float (&sum)[4], const Factor<float>& left,
                                                  const Factor<float>& right, int second, bool exact) {
    const uint32_t high[2] = {right.high[2 * second], right.high[2 * second + 1]};
    const uint32_t low[2] = {right.low[2 * second], right.low[2 * second + 1]};
    if (!exact) {
      device::mma_m16n8k8_tf32(sum, left.high, high);
      return;
    }
    float part[4] = {};
    device::mma_m16n8k8_tf32(part, left.low, high);
    device::mma_m16n8k8_tf32(part, left.high, low);
    device::mma_m16n8k8_tf32(part, left.high, high);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] += part[e];
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
