// Barriers of a block. All threads of a warp must execute the same call (PTX ISA, "bar, barrier": .aligned).
#pragma once

#include <cuda_runtime.h>

namespace fastgen::device {

// Every thread of the block has arrived, and its memory is seen. PTX ISA, "bar.sync 0".
__device__ __forceinline__ void sync_block() { __syncthreads(); }

// One of 16 barriers (0 is sync_block's), for ``threads`` threads of the block, a multiple of 32.
// sync_named waits until that many have arrived, by either call, and sees what they wrote. PTX ISA, "bar.sync a, b".
__device__ __forceinline__ void sync_named(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Arrives without waiting. PTX ISA, "bar.arrive a, b".
__device__ __forceinline__ void arrive_named(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace fastgen::device
