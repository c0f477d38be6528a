// Sample kernels with a warp that produces and a warp that consumes, through a ring of two stages. Each has a template
// parameter that plants one bug.
#pragma once

#include "device/barrier.cuh"
#include "device/copy.cuh"
#include "device/mbarrier.cuh"
#include "kernels/registry.h"

namespace fastgen::kernels {

constexpr int kRingThreads = 64, kRingStages = 2;

struct RingTile {
  alignas(16) uint32_t words[kRingStages][32];
};

namespace named_ring {

enum Mistake {
  kNone,
  kNoWaitForFull,
  kNoWaitForEmpty,
  kNoArrivalAtFull,
  kNoArrivalAtEmpty,
  kTooManyThreads,
  kCountsDiffer,
  kProducerStopsEarly,
  kArrivesTwice,
  kNoSuchBarrier,
  kOneBarrierForBoth,
};

// out: the n[0] rows of 32 words, each reversed.
template <Mistake kMistake>
__global__ void kernel(Arguments a) {
  RingTile& tile = device::shared_variable<RingTile>();
  const int lane = threadIdx.x % 32, rows = a.n[0];
  constexpr int kThreads = kMistake == kTooManyThreads ? 96 : kRingThreads;
  constexpr int kFull = 1, kEmpty = kMistake == kOneBarrierForBoth ? kFull : kMistake == kNoSuchBarrier ? 15 : 3;
  if (threadIdx.x < 32) {
    for (int row = 0; row < rows - (kMistake == kProducerStopsEarly ? 1 : 0); ++row) {
      const int stage = row % kRingStages;
      if (row >= kRingStages && kMistake != kNoWaitForEmpty) device::sync_named(kEmpty + stage, kThreads);
      tile.words[stage][lane] = words(a)[row * 32 + lane];
      if (kMistake != kNoArrivalAtFull) device::arrive_named(kFull + stage, kThreads);
      if (kMistake == kArrivesTwice) device::arrive_named(kFull + stage, kThreads);
    }
  } else {
    for (int row = 0; row < rows; ++row) {
      const int stage = row % kRingStages;
      if (kMistake != kNoWaitForFull) device::sync_named(kFull + stage, kMistake == kCountsDiffer ? 32 : kThreads);
      results(a)[row * 32 + lane] = tile.words[stage][31 - lane];
      if (row + kRingStages < rows && kMistake != kNoArrivalAtEmpty) device::arrive_named(kEmpty + stage, kThreads);
    }
  }
}

}  // namespace named_ring

namespace mbarrier_ring {

enum Mistake {
  kNone,
  kConsumerParity,
  kProducerParity,
  kNoWaitForFull,
  kNoWaitForEmpty,
  kCountTooSmall,
  kCountTooLarge,
  kOneArrivalLess,
  kOneArrivalMore,
  kNoInit,
  kNoBarrierAfterInit,
  kInitTwice,
  kReadsBarrier,
  kExpectsTooMuch,
};

struct Barriers {
  device::Mbarrier full[kRingStages], empty[kRingStages];
};

// out: the n[0] rows of 32 words, each reversed.
template <Mistake kMistake>
__global__ void kernel(Arguments a) {
  RingTile& tile = device::shared_variable<RingTile>();
  Barriers& barriers = device::shared_variable<Barriers>();
  const int lane = threadIdx.x % 32, rows = a.n[0];
  if (threadIdx.x == 0 && kMistake != kNoInit) {
    for (int stage = 0; stage < kRingStages; ++stage) {
      device::mbarrier_init(&barriers.full[stage], kMistake == kCountTooSmall   ? 16
                                                   : kMistake == kCountTooLarge ? 33
                                                                                : 32);
      device::mbarrier_init(&barriers.empty[stage], 32);
      if (kMistake == kInitTwice) device::mbarrier_init(&barriers.full[stage], 32);
    }
  }
  if (kMistake != kNoBarrierAfterInit) device::sync_block();
  for (int row = 0; row < rows; ++row) {
    const int stage = row % kRingStages, parity = row / kRingStages % 2;
    if (threadIdx.x < 32) {
      // A stage is empty before it was ever full: the wait for the phase before the first passes.
      if (kMistake != kNoWaitForEmpty) {
        device::mbarrier_wait(&barriers.empty[stage], kMistake == kProducerParity ? parity : parity ^ 1);
      }
      tile.words[stage][lane] = words(a)[row * 32 + lane];
      if constexpr (kMistake == kExpectsTooMuch) {
        if (lane == 0) device::mbarrier_expect(&barriers.full[stage], 64);
      }
      if (kMistake != kOneArrivalLess || lane != 31) device::mbarrier_arrive(&barriers.full[stage]);
      if (kMistake == kOneArrivalMore && lane == 31) device::mbarrier_arrive(&barriers.full[stage]);
    } else {
      if (kMistake != kNoWaitForFull) {
        device::mbarrier_wait(&barriers.full[stage], kMistake == kConsumerParity ? parity ^ 1 : parity);
      }
      results(a)[row * 32 + lane] = tile.words[stage][31 - lane];
      if (kMistake == kReadsBarrier) results(a)[row * 32 + lane] = static_cast<uint32_t>(barriers.full[stage].opaque);
      device::mbarrier_arrive(&barriers.empty[stage]);
    }
  }
}

}  // namespace mbarrier_ring

namespace copy_ring {

enum Mistake {
  kNone,
  kArrivesAtOnce,
  kNoArrival,
  kNoWaitForEmpty,
  kNoWaitForFull,
};

using mbarrier_ring::Barriers;

// The same, but the producer's lanes copy asynchronously, 4 bytes each, and never wait for their copies.
template <Mistake kMistake>
__global__ void kernel(Arguments a) {
  RingTile& tile = device::shared_variable<RingTile>();
  Barriers& barriers = device::shared_variable<Barriers>();
  const int lane = threadIdx.x % 32, rows = a.n[0];
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kRingStages; ++stage) {
      device::mbarrier_init(&barriers.full[stage], 32);
      device::mbarrier_init(&barriers.empty[stage], 32);
    }
  }
  device::sync_block();
  for (int row = 0; row < rows; ++row) {
    const int stage = row % kRingStages, parity = row / kRingStages % 2;
    if (threadIdx.x < 32) {
      if (kMistake != kNoWaitForEmpty) device::mbarrier_wait(&barriers.empty[stage], parity ^ 1);
      device::async_copy<4>(&tile.words[stage][lane], words(a) + row * 32 + lane);
      if constexpr (kMistake == kArrivesAtOnce) {
        device::mbarrier_arrive(&barriers.full[stage]);
      } else if constexpr (kMistake != kNoArrival) {
        device::async_copy_arrive(&barriers.full[stage]);
      }
    } else {
      if (kMistake != kNoWaitForFull) device::mbarrier_wait(&barriers.full[stage], parity);
      results(a)[row * 32 + lane] = tile.words[stage][31 - lane];
      device::mbarrier_arrive(&barriers.empty[stage]);
    }
  }
}

}  // namespace copy_ring

}  // namespace fastgen::kernels
