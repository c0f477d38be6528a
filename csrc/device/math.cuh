// Fast approximate arithmetic of the special-function unit.
#pragma once

#include <cuda_runtime.h>

namespace fastgen::device {

// 2^x, relative error about 2^-22; exact at integers, 0 at -inf; subnormal arguments and results become 0.
// PTX ISA, "ex2" (.approx.ftz.f32).
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace fastgen::device
