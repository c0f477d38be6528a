// The chunk of a thread: 16 bytes of each operand, a whole number of Philox groups.
#pragma once

#include "common/philox.h"
#include "device/vector.cuh"
#include "latent/params.h"
#include "latent/tiles.h"

namespace fastgen::latent {

template <typename T>
constexpr int kChunk = chunk_elements(sizeof(T));

// Elements of one operand, in the storage type. kVector: rows are 16-byte aligned and a whole number of chunks, so a
// chunk is one access. Otherwise its groups are accessed one by one, by element, with zeros past the end of the row. An
// absent operand is zeros.
template <typename T, bool kVector>
struct Chunk {
  static constexpr int kElements = kVector ? kChunk<T> : kGroup;
  T elements[kElements];

  // Of the current group.
  __device__ __forceinline__ float operator[](int i) const { return device::to_float(elements[i]); }
  __device__ __forceinline__ void set(int i, float value) { elements[i] = device::from_float<T>(value); }

  __device__ __forceinline__ void load_chunk(const Input& input, int64_t row, int64_t col) {
    if constexpr (kVector) {
      if (input.data != nullptr) device::load_vector(at<const T>(input.data, row * input.row_stride + col), elements);
    }
  }
  __device__ __forceinline__ void load_group(const Input& input, int64_t row, int64_t col, int64_t cols) {
    if constexpr (!kVector) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const bool valid = input.data != nullptr && col + i < cols;
        elements[i] = valid ? *at<const T>(input.data, row * input.row_stride + col + i) : T{};
      }
    }
  }
  __device__ __forceinline__ void store_group(void* target, int64_t row, int64_t col, int64_t cols) const {
    if constexpr (!kVector) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (col + i < cols) *at<T>(target, row * cols + col + i) = elements[i];
      }
    }
  }
  __device__ __forceinline__ void store_chunk(void* target, int64_t row, int64_t col, int64_t cols) const {
    if constexpr (kVector) device::store_vector(at<T>(target, row * cols + col), elements);
  }
  // Makes the next group the current one; after the last, the first. The loop over groups is not unrolled, to save
  // registers in 16-bit types, and an array in registers cannot be indexed by a loop's variable.
  __device__ __forceinline__ void next_group() {
#pragma unroll
    for (int i = 0; i + kGroup < kElements; ++i) {
      const T element = elements[i];
      elements[i] = elements[i + kGroup], elements[i + kGroup] = element;
    }
  }

 private:
  template <typename U, typename Data>
  static __device__ __forceinline__ U* at(Data* data, int64_t index) {
    return static_cast<U*>(data) + index;
  }
};

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
