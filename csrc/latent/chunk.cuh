// The chunk of a thread: 16 bytes of each operand, a whole number of Philox groups.
#pragma once

#include "common/philox.h"
#include "device/vector.cuh"
#include "latent/params.h"
#include "latent/tiles.h"

namespace fastgen::latent {

template <typename T>
constexpr int kChunk = chunk_elements(sizeof(T));

// In the storage type: a chunk of 16-bit elements takes 4 registers, and is converted to float32 group by group.
template <typename T>
struct Chunk {
  T elements[kChunk<T>];

  __device__ __forceinline__ float operator[](int i) const { return device::to_float(elements[i]); }
  __device__ __forceinline__ void set(int i, float value) { elements[i] = device::from_float<T>(value); }
};

// kVector: rows are 16-byte aligned and a whole number of chunks. Otherwise element by element, with zeros past the end
// of the row. An absent operand is zeros.
template <typename T, bool kVector>
__device__ __forceinline__ Chunk<T> load_chunk(const Input& input, int64_t row, int64_t col, int64_t cols) {
  Chunk<T> chunk = {};
  if (input.data == nullptr) return chunk;
  const T* source = static_cast<const T*>(input.data) + row * input.row_stride + col;
  if constexpr (kVector) {
    device::load_vector(source, chunk.elements);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      if (col + i < cols) chunk.elements[i] = source[i];
    }
  }
  return chunk;
}

template <typename T, bool kVector>
__device__ __forceinline__ void store_chunk(void* target, int64_t row, int64_t col, int64_t cols,
                                            const Chunk<T>& chunk) {
  T* out = static_cast<T*>(target) + row * cols + col;
  if constexpr (kVector) {
    device::store_vector(out, chunk.elements);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      if (col + i < cols) out[i] = chunk.elements[i];
    }
  }
}

// The seed of a row's noise, and the index of its first group.
struct NoiseRow {
  uint64_t seed, first_group;
};

__device__ __forceinline__ NoiseRow noise_row(const Noise& noise, int64_t row, int64_t cols) {
  // The usual case, one seed for all rows, avoids a slow 64-bit division.
  const int64_t seed_index = row < noise.rows_per_seed ? 0 : row / noise.rows_per_seed;
  return {static_cast<uint64_t>(noise.seeds[seed_index]),
          static_cast<uint64_t>((row - seed_index * noise.rows_per_seed) * ceil_div(cols, kGroup))};
}

// The noise of the group at column col.
__device__ __forceinline__ void noise_group(const NoiseRow& row, int64_t col, float (&noise)[kGroup]) {
  normal_group(row.seed, row.first_group + col / kGroup, noise);
}

}  // namespace fastgen::latent
