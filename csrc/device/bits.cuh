// Shifts whose distance may exceed the width of the word.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastgen::device {

// ``bits`` is clamped to 32: the result is 0 from there on. PTX ISA, "shl" (.b32), "shr" (.u32).
__device__ __forceinline__ uint32_t shift_left(uint32_t word, uint32_t bits) {
  uint32_t result;
  asm("shl.b32 %0, %1, %2;" : "=r"(result) : "r"(word), "r"(bits));
  return result;
}
__device__ __forceinline__ uint32_t shift_right(uint32_t word, uint32_t bits) {
  uint32_t result;
  asm("shr.u32 %0, %1, %2;" : "=r"(result) : "r"(word), "r"(bits));
  return result;
}

// ``word``, without the compiler's knowledge of where it comes from: what a loop computes from it is not moved out of
// the loop, where it would take registers.
__device__ __forceinline__ uint32_t opaque(uint32_t word) {
  asm volatile("" : "+r"(word));
  return word;
}

}  // namespace fastgen::device
