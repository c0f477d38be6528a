// Storage types to float32 and back. Rounding is to nearest, ties to even.
#pragma once

#include <cuda_runtime.h>

#include "common/types.h"

namespace fastgen::device {

__device__ __forceinline__ float to_float(float value) { return value; }
// PTX ISA, "cvt" (.f32.f16). A bfloat16 is the upper half of a float32.
__device__ __forceinline__ float to_float(Half value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
__device__ __forceinline__ float to_float(BFloat16 value) { return bits_to_float(uint32_t{value.bits} << 16); }

// PTX ISA, "cvt" (.rn.f16.f32, .rn.bf16.f32).
template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ Half from_float<Half>(float value) {
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}

// Two values in one register, the first in its low half. PTX ISA, "cvt" (.rn.f16x2.f32, .rn.bf16x2.f32).
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// A float32 as tf32 (10 bits of mantissa), ties away from zero. PTX ISA, "cvt" (.rna.tf32.f32).
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

}  // namespace fastgen::device
