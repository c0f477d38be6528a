// Threads of a warp and of a block: shuffles and barriers.
#pragma once

#include <cuda_runtime.h>

namespace fastgen::device {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// The value of lane (own lane ^ mask). All 32 lanes take part. PTX ISA, "shfl.sync" (mode .bfly).
__device__ __forceinline__ float shuffle_xor(float value, int mask) { return __shfl_xor_sync(kFullMask, value, mask); }

// Every thread of the block has arrived, and its shared-memory writes are seen. PTX ISA, "barrier.sync".
__device__ __forceinline__ void sync_block() { __syncthreads(); }

}  // namespace fastgen::device
