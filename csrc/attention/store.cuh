// Epilogue: accumulator fragments to rows of a tensor.
#pragma once

#include "attention/tile.cuh"
#include "device/vector.cuh"
#include "device/warp.cuh"

namespace fastgen::attention {

// Stores 16 columns of a row from two fragments of its four lanes, in full sectors of 32 bytes.
__device__ __forceinline__ void store_columns(float* row, int columns, const float (&first)[2],
                                              const float (&second)[2]) {
  const int column = lane_column();
  const uint32_t words[2][2] = {{float_to_bits(first[0]), float_to_bits(first[1])},
                                {float_to_bits(second[0]), float_to_bits(second[1])}};
  if (column < columns) device::store_words(row + column, words[0]);
  if (8 + column < columns) device::store_words(row + 8 + column, words[1]);
}

template <typename T>
__device__ __forceinline__ void store_columns(T* row, int columns, const float (&first)[2], const float (&second)[2]) {
  // Lane t holds columns (2t, 2t + 1) and (8 + 2t, 9 + 2t); exchange so that it stores 4t ... 4t + 3.
  const int t = threadIdx.x % 4;
  const bool upper = t >= 2, odd = t % 2 != 0;
  uint32_t low = device::pack<T>(first[0], first[1]), high = device::pack<T>(second[0], second[1]);
  const uint32_t from_two = device::shuffle_xor(upper ? low : high, 2);
  // Now one fragment per half of the quad: the columns of lanes t % 2 and t % 2 + 2.
  low = upper ? from_two : low, high = upper ? high : from_two;
  const uint32_t from_one = device::shuffle_xor(odd ? low : high, 1);
  low = odd ? from_one : low, high = odd ? high : from_one;
  const uint32_t words[2] = {low, high};
  if (4 * t < columns) device::store_words(row + 4 * t, words);
}

// Stores ``count`` rows of sums, each times its factor: row g of fragment m is row m * 16 + g.
template <typename T, int kFragments, int kColumnTiles>
__device__ __forceinline__ void store_rows(T* corner, int64_t stride, int count, int columns,
                                           const float (&factors)[kFragments][2],
                                           const float (&sums)[kFragments][kColumnTiles][4]) {
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * kFragmentRows + half * 8 + lane_row();
      const float factor = factors[m][half];
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; tile += 2) {
        const float first[2] = {sums[m][tile][2 * half] * factor, sums[m][tile][2 * half + 1] * factor};
        const float second[2] = {sums[m][tile + 1][2 * half] * factor, sums[m][tile + 1][2 * half + 1] * factor};
        store_columns(corner + row * stride + tile * 8, row < count ? columns - tile * 8 : 0, first, second);
      }
    }
  }
}

}  // namespace fastgen::attention
