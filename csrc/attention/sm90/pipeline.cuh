// The ring of tiles between the producer and the consumers.
//
// full[i] completes when the bytes of stage i have arrived, empty[i] when every warp of the consumers has left it.
// Keys and values have stages of their own: the scores of the next tile need its keys before the values of the current
// one are done with.
#pragma once

#include "attention/sm90/plan.h"
#include "device/fence.cuh"
#include "device/mbarrier.cuh"

namespace fastgen::attention::sm90 {

constexpr int kMostStages = 4, kMostQueryBuffers = 2;
constexpr int kConsumerWarps = kConsumers * kGroupThreads / 32;

struct Barriers {
  device::Mbarrier query_full[kMostQueryBuffers], query_empty[kMostQueryBuffers];
  device::Mbarrier key_full[kMostStages], key_empty[kMostStages], value_full[kMostStages], value_empty[kMostStages];
};
static_assert(sizeof(Barriers) <= kMbarrierBytes, "the barriers have their place in static shared memory");

// By one thread; the block has to synchronize after it.
__device__ __forceinline__ void initialize(Barriers& barriers, int query_buffers, int stages, int consumer_warps) {
  for (int buffer = 0; buffer < query_buffers; ++buffer) {
    device::mbarrier_init(&barriers.query_full[buffer], 1);
    device::mbarrier_init(&barriers.query_empty[buffer], consumer_warps);
  }
  for (int stage = 0; stage < stages; ++stage) {
    device::mbarrier_init(&barriers.key_full[stage], 1);
    device::mbarrier_init(&barriers.value_full[stage], 1);
    device::mbarrier_init(&barriers.key_empty[stage], consumer_warps);
    device::mbarrier_init(&barriers.value_empty[stage], consumer_warps);
  }
  device::fence_mbarrier_init();
}

// A position in the ring. A stage is empty before it was ever full: the wait for the phase before the first passes.
template <int kStages>
struct Position {
  int stage = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ int last_stage() const { return stage == 0 ? kStages - 1 : stage - 1; }
};

// The warp has left a stage: all of its products that read it are complete.
__device__ __forceinline__ void leave(device::Mbarrier* empty) {
  if (threadIdx.x % 32 == 0) device::mbarrier_arrive(empty);
}

}  // namespace fastgen::attention::sm90
