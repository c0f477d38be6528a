// Asynchronous copies from global to shared memory (cp.async).
//
// A copy completes at any time between its start and a wait of the same thread that covers it. The wait makes the data
// visible to that thread; other threads need a barrier after it.
#pragma once

#include "device/mbarrier.cuh"
#include "device/shared.cuh"

namespace fastgen::device {

// Copies the first ``valid`` of kBytes bytes (4, 8 or 16, both addresses multiples of that) and writes zeros for the
// rest; with valid = 0 the source is not read. PTX ISA, "cp.async" (.ca, or .cg for 16 bytes, which skips L1).
template <int kBytes>
__device__ __forceinline__ void async_copy(void* target, const void* source, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(target)),
                 "l"(__cvta_generic_to_global(source)), "n"(kBytes), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(target)),
                 "l"(__cvta_generic_to_global(source)), "n"(kBytes), "r"(valid)
                 : "memory");
  }
}

// Closes the group of the copies that this thread has started since the last. PTX ISA, "cp.async.commit_group".
__device__ __forceinline__ void async_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the newest kGroups groups of this thread. PTX ISA, "cp.async.wait_group".
template <int kGroups>
__device__ __forceinline__ void async_copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Waits for all copies of this thread, in groups or not. PTX ISA, "cp.async.wait_all".
__device__ __forceinline__ void async_copy_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Arrives at the mbarrier once all copies that this thread has started are complete; counts as one of the arrivals it
// expects. Does not wait. PTX ISA, "cp.async.mbarrier.arrive" (.noinc).
__device__ __forceinline__ void async_copy_arrive(Mbarrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

}  // namespace fastgen::device
