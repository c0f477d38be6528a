// Sample kernels that pass values between the threads of a block or a warp. Each has a template parameter that plants
// one bug; kNone is the correct kernel.
#pragma once

#include "device/atomic.cuh"
#include "device/barrier.cuh"
#include "device/shared.cuh"
#include "device/vector.cuh"
#include "device/warp.cuh"
#include "kernels/registry.h"

namespace fastgen::kernels {

namespace reverse {

enum Mistake {
  kNone,
  kNoBarrier,
  kNoBarrierAtEnd,
  kReadsBeforeBegin,
  kReadsPastEnd,
  kWritesPastEnd,
  kWritesPastTile,
  kLeavesOneOut,
  kWideRead,
  kVectorRead,
  kVectorWrite,
  kHalfTheBlock,
  kTwoBarriers,
  kReturnsEarly,
  kWritesInput,
  kAccumulates,
  kForgetsBlock,
};

constexpr int kThreads = 128;

struct Tile {
  alignas(16) uint32_t words[kThreads];
};

// Each block reverses its 128 words (the last block, what is left of n[0]), twice, adding 1 the second time.
template <Mistake kMistake>
__global__ void kernel(Arguments a) {
  Tile& tile = device::shared_variable<Tile>();
  const int thread = threadIdx.x, begin = blockIdx.x * kThreads;
  const int count = a.n[0] - begin < kThreads ? a.n[0] - begin : kThreads;
  if (kMistake == kReturnsEarly && thread >= count) return;
  for (int round = 0; round < 2; ++round) {
    const bool last = round == 1;
    int from = begin + thread;
    if (kMistake == kReadsBeforeBegin) from -= 1;
    int to = thread;
    if (kMistake == kWritesPastTile && count == kThreads) to += 1;
    bool mine = thread < count;
    if (kMistake == kLeavesOneOut) mine = thread < count - 1;
    if (kMistake == kReadsPastEnd) mine = thread <= count;
    if (mine) {
      uint32_t word;
      if constexpr (kMistake == kWideRead) {
        word = static_cast<uint32_t>(*reinterpret_cast<const uint64_t*>(words(a) + from));
      } else if constexpr (kMistake == kVectorRead) {
        uint32_t four[4];
        device::load_vector(words(a) + from, four);
        word = four[0];
      } else {
        word = words(a)[from];
      }
      if constexpr (kMistake == kVectorWrite) {
        const uint32_t four[4] = {word, word, word, word};
        device::store_vector(tile.words + (to < kThreads - 4 ? to : kThreads - 5), four);
      }
      tile.words[to] = word + round;
    }
    if constexpr (kMistake == kHalfTheBlock) {
      if (!last || thread < kThreads / 2) device::sync_block();
    } else if constexpr (kMistake == kTwoBarriers) {
      if (thread % 2 == 0) {
        device::sync_block();
      } else {
        device::sync_block();
      }
    } else {
      if (!(kMistake == kNoBarrier && last)) device::sync_block();
    }
    if (thread < count) {
      int target = begin + thread;
      if (kMistake == kWritesPastEnd) target += 1;
      if (kMistake == kForgetsBlock) target = thread;
      const uint32_t word = tile.words[count - 1 - thread];
      results(a)[target] = kMistake == kAccumulates ? results(a)[target] + word : word;
      if (kMistake == kWritesInput) const_cast<uint32_t*>(words(a))[target] = 0;
    }
    if (!last && kMistake != kNoBarrierAtEnd) device::sync_block();
  }
}

}  // namespace reverse

namespace exchange {

enum Mistake {
  kNone,
  kNoSync,
  kNoSyncAtEnd,
  kHalfMask,
  kSyncsHalves,
  kLaneLeaves,
  kShufflesOutside,
  kShufflesAlone,
  kSyncsAlone,
  kVotesApart,
};

constexpr int kThreads = 64;

struct Tile {
  uint32_t words[kThreads];
};

// Each lane adds twice the word of the next lane, and 1, to the sum over its warp.
template <Mistake kMistake>
__global__ void kernel(Arguments a) {
  Tile& tile = device::shared_variable<Tile>();
  const int thread = threadIdx.x, lane = thread % device::kWarpSize, first = thread - lane;
  const uint32_t word = words(a)[thread];
  uint32_t next = 0;
  for (int round = 0; round < 2; ++round) {
    const Mistake mistake = round == 1 ? kMistake : kNone;
    tile.words[thread] = word + round;
    if (mistake == kLaneLeaves && lane == 31) return;
    if (mistake == kHalfMask) {
      device::sync_warp(0xffffu);
    } else if (mistake == kSyncsHalves) {
      device::sync_warp(lane < 16 ? 0x0000ffffu : 0xffff0000u);
    } else if (mistake != kNoSync) {
      device::sync_warp();
    }
    if (mistake == kSyncsAlone && lane < 16) device::sync_warp();
    next += tile.words[first + (lane + 1) % device::kWarpSize];
    if (round == 0 && kMistake != kNoSyncAtEnd) device::sync_warp();
  }
  uint32_t sum = word;
  if (kMistake == kShufflesAlone && lane >= 16) return;
  if (kMistake == kVotesApart && lane < 16 && device::any_lane(word == 0)) sum += 1;
  for (int offset = 16; offset > 0; offset /= 2) {
    if constexpr (kMistake == kShufflesOutside) {
      if (lane < 16) sum += device::shuffle_xor(sum, offset, 0xffffu);
    } else {
      sum += device::shuffle_xor(sum, offset);
    }
  }
  results(a)[thread] = next + sum;
}

}  // namespace exchange

namespace histogram {

enum Mistake {
  kNone,
  kNoZeros,
  kPlainShared,
  kPlainGlobal,
  kNoBarrierAfterZeros,
  kNoBarrierAfterCounts,
  kOneBinMore,
  kWaitsForNobody,
};

constexpr int kBins = 16;

struct Counts {
  uint32_t of[kBins];
};

// Counts n[0] words below 16, all blocks together.
template <Mistake kMistake>
__global__ void kernel(Arguments a) {
  Counts& counts = device::shared_variable<Counts>();
  const int thread = threadIdx.x;
  if (kMistake != kNoZeros && thread < kBins) counts.of[thread] = 0;
  if (kMistake != kNoBarrierAfterZeros) device::sync_block();
  for (int i = blockIdx.x * blockDim.x + thread; i < a.n[0]; i += gridDim.x * blockDim.x) {
    const uint32_t bin = words(a)[i] + (kMistake == kOneBinMore ? 1 : 0);
    if constexpr (kMistake == kPlainShared) {
      counts.of[bin] += 1;
    } else {
      device::atomic_add(&counts.of[bin], 1u);
    }
  }
  if (kMistake != kNoBarrierAfterCounts) device::sync_block();
  if constexpr (kMistake == kWaitsForNobody) {
    while (device::atomic_add(results(a) + thread % kBins, 0u) == 0) {
    }
  }
  if (thread >= kBins) return;
  if constexpr (kMistake == kPlainGlobal) {
    results(a)[thread] += counts.of[thread];
  } else {
    device::atomic_add(results(a) + thread, counts.of[thread]);
  }
}

}  // namespace histogram

}  // namespace fastgen::kernels
