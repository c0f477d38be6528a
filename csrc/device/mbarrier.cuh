// Barriers in shared memory that count arrivals and bytes, phase by phase. PTX ISA, "mbarrier".
//
// A phase completes when the expected arrivals have arrived and the expected bytes are complete; the next begins at
// once. Phases are told apart by their parity, 0 for the first.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device/shared.cuh"

namespace fastgen::device {

struct alignas(8) Mbarrier {
  uint64_t opaque;
};

// One thread does this; a barrier of the block makes it known to others. PTX ISA, "mbarrier.init".
__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// The memory may be used for other things afterwards. PTX ISA, "mbarrier.inval".
__device__ __forceinline__ void mbarrier_invalidate(Mbarrier* barrier) {
  asm volatile("mbarrier.inval.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// What the thread did before is seen by those who wait for the phase. PTX ISA, "mbarrier.arrive" (.release.cta).
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and has the phase expect that many bytes more. sm_90. PTX ISA, "mbarrier.arrive" (.expect_tx).
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
  asm volatile(
      "{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Has the phase expect that many bytes more. sm_90. PTX ISA, "mbarrier.expect_tx".
__device__ __forceinline__ void mbarrier_expect(Mbarrier* barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Says that so many of the expected bytes are complete, as bulk copies do by themselves. sm_90. PTX ISA,
// "mbarrier.complete_tx".
__device__ __forceinline__ void mbarrier_complete(Mbarrier* barrier, int bytes) {
  asm volatile("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Whether the phase of this parity, the current or the one before it, has completed; if so, what its arrivals did
// before is seen. PTX ISA, "mbarrier.test_wait" (.parity, .acquire.cta).
__device__ __forceinline__ bool mbarrier_test(const Mbarrier* barrier, int parity) {
  uint32_t done;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return done != 0;
}

// Waits until it has. sm_90 lets the thread sleep meanwhile: PTX ISA, "mbarrier.try_wait".
__device__ __forceinline__ void mbarrier_wait(const Mbarrier* barrier, int parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  while (done == 0) {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  }
#else
  while (!mbarrier_test(barrier, parity)) {
  }
#endif
}

}  // namespace fastgen::device
