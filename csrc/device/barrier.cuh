// Barriers of a block. All threads of a warp must execute the same call (PTX ISA, "bar, barrier": .aligned).
#pragma once

#include <cuda_runtime.h>

namespace fastgen::device {

// Barrier of the whole block; earlier memory accesses become visible to all its threads. PTX ISA, "bar.sync 0".
__device__ __forceinline__ void sync_block() { __syncthreads(); }

// Named barriers: one of 16 (0 is sync_block's), for ``threads`` threads of the block, a multiple of 32. sync_named
// waits until that many have arrived by either call; their earlier writes become visible. PTX ISA, "bar.sync a, b".
__device__ __forceinline__ void sync_named(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Arrives without waiting. PTX ISA, "bar.arrive a, b".
__device__ __forceinline__ void arrive_named(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace fastgen::device
