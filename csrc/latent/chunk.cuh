// One thread's piece of a row: 16 bytes of each operand, a whole number of Philox groups.
#pragma once

#include "common/philox.h"
#include "device/vector.cuh"
#include "latent/config.h"
#include "latent/params.h"

namespace fastgen::latent {

template <typename T>
constexpr int kChunk = chunk_elements(sizeof(T));

template <typename T>
using Chunk = float[kChunk<T>];

// kVector: rows are 16-byte aligned and a whole number of chunks. Otherwise element by element, up to cols.
template <typename T, bool kVector>
__device__ __forceinline__ void load_chunk(const Input& input, int64_t row, int64_t col, int64_t cols,
                                           Chunk<T>& values) {
  const T* source = static_cast<const T*>(input.data) + row * input.row_stride + col;
  if constexpr (kVector) {
    device::load_vector<T>(source, values);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) values[i] = col + i < cols ? device::to_float(source[i]) : 0.0f;
  }
}

template <typename T, bool kVector>
__device__ __forceinline__ void load_optional(const Input& input, int64_t row, int64_t col, int64_t cols,
                                              Chunk<T>& values) {
  if (input.data != nullptr) {
    load_chunk<T, kVector>(input, row, col, cols, values);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) values[i] = 0.0f;
  }
}

template <typename T, bool kVector>
__device__ __forceinline__ void store_chunk(void* target, int64_t row, int64_t col, int64_t cols,
                                            const Chunk<T>& values) {
  T* out = static_cast<T*>(target) + row * cols + col;
  if constexpr (kVector) {
    device::store_vector<T>(out, values);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      if (col + i < cols) out[i] = device::from_float<T>(values[i]);
    }
  }
}

// Where a row's noise begins: its seed, and the index of its first group.
struct NoiseRow {
  uint64_t seed, first_group;
};

__device__ __forceinline__ NoiseRow noise_row(const Noise& noise, int64_t row, int64_t cols) {
  const int64_t which = row / noise.rows_per_seed;
  return {static_cast<uint64_t>(noise.seeds[which]),
          static_cast<uint64_t>((row - which * noise.rows_per_seed) * ceil_div(cols, kGroup))};
}

template <typename T>
__device__ __forceinline__ void noise_chunk(const NoiseRow& row, int64_t col, Chunk<T>& noise) {
#pragma unroll
  for (int i = 0; i < kChunk<T>; i += kGroup) {
    normal_group(row.seed, row.first_group + (col + i) / kGroup, noise + i);
  }
}

}  // namespace fastgen::latent
