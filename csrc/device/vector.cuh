// Global-memory access, 16 bytes at a time or one element at a time, and conversion to float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/types.h"

namespace fastgen::device {

constexpr int kVectorBytes = 16;

// How many elements one 16-byte access moves.
template <typename T>
constexpr int kVectorElements = kVectorBytes / static_cast<int>(sizeof(T));

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ __forceinline__ float to_float(BFloat16 value) { return __bfloat162float(__ushort_as_bfloat16(value.bits)); }

// Round to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ Half from_float<Half>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

// Consecutive elements from a 16-byte aligned address. PTX ISA, "ld" (.global.v4.b32).
template <typename T>
__device__ __forceinline__ void load_vector(const T* source, T (&elements)[kVectorElements<T>]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(source);
  memcpy(elements, &raw, sizeof(raw));
}

// The same, stored. PTX ISA, "st" (.global.v4.b32).
template <typename T>
__device__ __forceinline__ void store_vector(T* target, const T (&elements)[kVectorElements<T>]) {
  uint4 raw;
  memcpy(&raw, elements, sizeof(raw));
  *reinterpret_cast<uint4*>(target) = raw;
}

}  // namespace fastgen::device
