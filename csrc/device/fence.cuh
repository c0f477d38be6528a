// Fences of sm_90 between proxies: the generic proxy, which executes loads and stores, and the asynchronous proxy,
// which executes tensor copies and matrix products of a warpgroup. PTX ISA, "Memory Consistency Model": proxies.
#pragma once

#include <cuda_runtime.h>

namespace fastgen::device {

// Writes to shared memory that this thread made or observed, by barriers, come before reads and writes of the
// asynchronous proxy that are ordered after this fence. PTX ISA, "fence.proxy" (.async).
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same for the mbarriers that this thread has initialized, and nothing else. PTX ISA, "fence.mbarrier_init".
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

}  // namespace fastgen::device
