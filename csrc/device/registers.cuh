// The registers of a warpgroup: four warps, the first a multiple of four. sm_90a.
#pragma once

#include <cuda_runtime.h>

namespace fastgen::device {

// All warps of the warpgroup have from now on kCount registers per thread: at least (increase) or at most (decrease) as
// many as before. increase_registers waits until other warps of the block have given up so many. New registers are
// uninitialized. PTX ISA, "setmaxnreg" (.inc, .dec).
template <int kCount>
__device__ __forceinline__ void increase_registers() {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0, "a multiple of 8 from 24 to 256");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void decrease_registers() {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0, "a multiple of 8 from 24 to 256");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace fastgen::device
