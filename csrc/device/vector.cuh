// Vectorized access of 16 or 8 bytes in global and shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "device/convert.cuh"

namespace fastgen::device {

constexpr int kVectorBytes = 16;

// Elements per 16-byte access.
template <typename T>
constexpr int kVectorElements = kVectorBytes / static_cast<int>(sizeof(T));

// Consecutive elements from a 16-byte aligned address. PTX ISA, "ld" (.v4.b32).
template <typename T>
__device__ __forceinline__ void load_vector(const T* source, T (&elements)[kVectorElements<T>]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(source);
  memcpy(elements, &raw, sizeof(raw));
}

// The same, stored. PTX ISA, "st" (.v4.b32).
template <typename T>
__device__ __forceinline__ void store_vector(T* target, const T (&elements)[kVectorElements<T>]) {
  uint4 raw;
  memcpy(&raw, elements, sizeof(raw));
  *reinterpret_cast<uint4*>(target) = raw;
}

// Two words from an 8-byte aligned address. PTX ISA, "ld" (.v2.b32).
__device__ __forceinline__ void load_words(const void* source, uint32_t (&words)[2]) {
  const uint2 raw = *static_cast<const uint2*>(source);
  words[0] = raw.x, words[1] = raw.y;
}

// Two words to an 8-byte aligned address. PTX ISA, "st" (.v2.b32).
__device__ __forceinline__ void store_words(void* target, const uint32_t (&words)[2]) {
  *static_cast<uint2*>(target) = {words[0], words[1]};
}

}  // namespace fastgen::device
