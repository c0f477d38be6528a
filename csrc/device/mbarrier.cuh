// Barriers in shared memory that count arrivals and bytes, phase by phase. PTX ISA, "mbarrier".
//
// A phase completes when the expected arrivals have arrived and the expected bytes are complete; the next begins at
// once. Phases are identified by their parity, 0 for the first.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device/shared.cuh"

namespace fastgen::device {

struct alignas(8) Mbarrier {
  uint64_t opaque;
};

// Called by one thread; other threads need a block barrier before use. PTX ISA, "mbarrier.init".
__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Ends the lifetime of the barrier; its memory may be reused. PTX ISA, "mbarrier.inval".
__device__ __forceinline__ void mbarrier_invalidate(Mbarrier* barrier) {
  asm volatile("mbarrier.inval.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Earlier accesses of this thread become visible to threads that wait for the phase. PTX ISA, "mbarrier.arrive"
// (.release.cta).
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives and adds ``bytes`` to the transaction count of the phase. sm_90. PTX ISA, "mbarrier.arrive" (.expect_tx).
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
  asm volatile(
      "{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Adds ``bytes`` to the transaction count of the phase. sm_90. PTX ISA, "mbarrier.expect_tx".
__device__ __forceinline__ void mbarrier_expect(Mbarrier* barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Completes ``bytes`` of the transaction count, as bulk copies do implicitly. sm_90. PTX ISA,
// "mbarrier.complete_tx".
__device__ __forceinline__ void mbarrier_complete(Mbarrier* barrier, int bytes) {
  asm volatile("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Whether the phase of this parity, the current or the preceding one, has completed; if so, accesses before its
// arrivals are visible. PTX ISA, "mbarrier.test_wait" (.parity, .acquire.cta).
__device__ __forceinline__ bool mbarrier_test(const Mbarrier* barrier, int parity) {
  uint32_t done;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return done != 0;
}

// Waits for the phase. sm_90 suspends the thread meanwhile: PTX ISA, "mbarrier.try_wait".
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
