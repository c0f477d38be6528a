// A sample kernel of a producer and a consumer warpgroup, with tensor copies and products of a warpgroup:
// out = sum over tiles of 64 keys of (Q K^T) V, for 64 queries and 64 columns. Its template parameter plants one bug.
#pragma once

#include "device/barrier.cuh"
#include "device/convert.cuh"
#include "device/fence.cuh"
#include "device/registers.cuh"
#include "device/tensor_copy.cuh"
#include "device/wgmma.cuh"
#include "kernels/registry.h"

namespace fastgen::kernels::chain {

enum Mistake {
  kNone,
  // Barriers and copies
  kNoInit,
  kNoMbarrierFence,
  kNoBarrierAfterInit,
  kNoExpect,
  kExpectsTooFew,
  kExpectsTooMany,
  kTwoProducers,
  kConsumerPhase,
  kProducerPhase,
  kNoWaitForFull,
  kNoWaitForEmpty,
  kLeavesEarly,
  kOneWarpLeaves,
  kMisalignedTarget,
  kThirdStage,
  kSwapsCoordinates,
  kReadsTargetEarly,
  kWritesTargetBefore,
  kEndsBeforeCopy,
  // Products
  kNoFence,
  kNoFenceAfterPacking,
  kNoCommit,
  kNoWait,
  kWaitsForTooFew,
  kReadsEarly,
  kOverwritesLeft,
  kOtherShape,
  kUnwrittenSum,
  kUnwrittenTile,
  kPastSharedMemory,
  kNoProxyFence,
  kProxyFenceTooEarly,
  kNoBarrierAfterClear,
  kUnswizzledWrite,
  kWrongStep,
  kWrongRows,
  kMisalignedTile,
  kWarpLeavesOneOut,
  kWarpsDiffer,
  kHalfWarp,
  kNoLastWait,
  // Registers
  kNoDecrease,
  kIncreasesToFewer,
  kOneWarpDecreases,
};

constexpr int kStages = 2, kRows = 64, kRowBytes = 128, kTileBytes = kRows * kRowBytes;
constexpr int kThreads = 2 * device::kWarpgroupSize, kConsumerWarps = device::kWarpgroupSize / 32;

struct Barriers {
  device::Mbarrier query, full[kStages], empty[kStages];
};

__device__ __forceinline__ unsigned char* query_tile() { return device::dynamic_shared(); }
__device__ __forceinline__ unsigned char* key_tile(int stage) { return query_tile() + (1 + stage) * kTileBytes; }
__device__ __forceinline__ unsigned char* value_tile(int stage) { return key_tile(kStages + stage); }

template <Mistake kMistake>
__device__ __forceinline__ void produce(const MappedArguments& a, Barriers& barriers, int tiles) {
  const int origin[] = {0, 0, 0, 0};
  device::mbarrier_arrive_expect(&barriers.query, kTileBytes);
  device::tensor_load(query_tile() + (kMistake == kMisalignedTarget ? 512 : 0), a.maps[0], origin, &barriers.query);
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kStages, parity = tile / kStages % 2;
    const int at[] = {kMistake == kSwapsCoordinates ? tile * kRows : 0,
                      kMistake == kSwapsCoordinates ? 0 : tile * kRows, 0, 0};
    if (kMistake != kNoWaitForEmpty) {
      device::mbarrier_wait(&barriers.empty[stage], kMistake == kProducerPhase ? parity : parity ^ 1);
    }
    if (kMistake == kWritesTargetBefore && tile == 0) *reinterpret_cast<uint32_t*>(key_tile(stage)) = 0;
    constexpr int kBytes = kMistake == kExpectsTooFew    ? kTileBytes
                           : kMistake == kExpectsTooMany ? 3 * kTileBytes
                                                         : 2 * kTileBytes;
    if (kMistake == kNoExpect) {
      device::mbarrier_arrive(&barriers.full[stage]);
    } else {
      device::mbarrier_arrive_expect(&barriers.full[stage], kBytes);
    }
    if (kMistake != kUnwrittenTile || tile > 0) {
      device::tensor_load(key_tile(stage), a.maps[1], at, &barriers.full[stage]);
    } else {
      device::mbarrier_complete(&barriers.full[stage], kTileBytes);
    }
    const int target = kMistake == kThirdStage && tile == 2 ? kStages : stage;
    device::tensor_load(value_tile(target), a.maps[2], at, &barriers.full[stage]);
    if (kMistake == kReadsTargetEarly) results(a)[0] = *reinterpret_cast<uint32_t*>(value_tile(stage));
  }
  if (kMistake == kEndsBeforeCopy) {
    device::mbarrier_wait(&barriers.empty[0], tiles / kStages % 2);
    device::tensor_load(key_tile(0), a.maps[1], origin, &barriers.query);
  }
}

// Values from row ``valid`` on are zeros.
template <Mistake kMistake>
__device__ __forceinline__ void clear_values(unsigned char* values, int valid) {
  if (kMistake == kProxyFenceTooEarly) device::fence_async_proxy();
  for (int word = static_cast<int>(threadIdx.x) % device::kWarpgroupSize; word < kTileBytes / 4;
       word += device::kWarpgroupSize) {
    if (word / 32 >= valid) reinterpret_cast<uint32_t*>(values)[word] = 0;
  }
  if (kMistake != kNoProxyFence && kMistake != kProxyFenceTooEarly) device::fence_async_proxy();
  if (kMistake != kNoBarrierAfterClear) device::sync_named(1, device::kWarpgroupSize);
}

template <Mistake kMistake>
__device__ __forceinline__ void consume(const MappedArguments& a, Barriers& barriers, int tiles) {
  using device::Rows;
  constexpr int kDepths = kRows / device::kWgmmaDepth;
  constexpr Rows kValueRows = kMistake == kWrongRows ? Rows::kOuter : Rows::kDepth;
  const int thread = static_cast<int>(threadIdx.x) % device::kWarpgroupSize, warp = thread / 32;
  float scores[8][4], sum[8][4];
  uint32_t left[kDepths][4];
  if constexpr (kMistake != kUnwrittenSum) {
    for (auto& columns : sum) {
      for (float& one : columns) one = 0.0f;
    }
  }
  device::mbarrier_wait(&barriers.query, 0);
  if (kMistake == kUnswizzledWrite) {  // the tile of Q once more, from global memory
    for (int i = thread; i < kTileBytes / 4; i += device::kWarpgroupSize) {
      reinterpret_cast<uint32_t*>(query_tile())[i] = words(a)[i];
    }
    device::fence_async_proxy();
    device::sync_named(1, device::kWarpgroupSize);
  }
  const auto query = device::matrix_tile<Rows::kOuter>(query_tile() + (kMistake == kMisalignedTile ? 128 : 0));
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kStages, parity = tile / kStages % 2;
    if (kMistake != kNoWaitForFull) {
      device::mbarrier_wait(&barriers.full[stage], kMistake == kConsumerPhase ? parity ^ 1 : parity);
    }
    const int valid = a.n[0] - tile * kRows;
    if (valid < kRows) clear_values<kMistake>(value_tile(stage), valid);
    const auto key = device::matrix_tile<Rows::kOuter>(key_tile(stage));
    const auto other = device::matrix_tile<Rows::kOuter>(key_tile(stage ^ 1));
    const auto value = device::matrix_tile<kValueRows>(value_tile(stage));

    if (kMistake != kNoFence) device::wgmma_fence(scores);
#pragma unroll
    for (int k = 0; k < kDepths; ++k) {
      constexpr int kStep = kMistake == kWrongStep ? 16 : 32;
      if (kMistake == kWarpLeavesOneOut && k == 2 && warp == 3) continue;
      if (kMistake == kHalfWarp && thread % 32 >= 16) continue;
      const auto right = kMistake == kWarpsDiffer && warp == 3 ? other : key;
      device::wgmma<Half>(scores, query.from(kStep * k + (kMistake == kPastSharedMemory ? 7 * kTileBytes : 0)),
                          right.from(kStep * k), k > 0);
    }
    if (kMistake == kOtherShape) device::wgmma<Half>(reinterpret_cast<float (&)[16][4]>(scores), query, key);
    if (kMistake == kReadsEarly) scores[0][0] += 1.0f;
    if (kMistake != kNoCommit) device::wgmma_commit();
    if (kMistake != kNoWait) device::wgmma_wait<kMistake == kWaitsForTooFew ? 1 : 0>(scores);

#pragma unroll
    for (int k = 0; k < kDepths; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&pair)[4] = scores[2 * k + i / 2];
        left[k][i] = device::pack<Half>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
      }
    }
    if (kMistake != kNoFenceAfterPacking) device::wgmma_fence(sum, left);
#pragma unroll
    for (int k = 0; k < kDepths; ++k) {
      device::wgmma<Half>(sum, left[k],
                          value.from(k * (kMistake == kWrongRows ? 32 : device::kWgmmaDepth * kRowBytes)));
    }
    device::wgmma_commit();
    if (kMistake == kOverwritesLeft) left[0][0] = 0;
    if (kMistake == kLeavesEarly && thread % 32 == 0) device::mbarrier_arrive(&barriers.empty[stage]);
    if (kMistake != kNoLastWait || tile + 1 < tiles) device::wgmma_wait<0>(sum, left);
    if (kMistake != kLeavesEarly && (thread % 32 == 0) && (kMistake != kOneWarpLeaves || warp == 0)) {
      device::mbarrier_arrive(&barriers.empty[stage]);
    }
  }
  const int row = warp * 16 + thread % 32 / 4, column = thread % 4 * 2;
  if (kMistake == kNoLastWait) return;
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      results(a)[(row + i / 2 * 8) * 64 + tile * 8 + column + i % 2] = float_to_bits(sum[tile][i]);
    }
  }
}

// in: Q (64, 64), K and V (rows, 64), of which the first n[0] rows are keys.
template <Mistake kMistake>
__global__ void __launch_bounds__(kThreads, 1) kernel(const __grid_constant__ MappedArguments a) {
  Barriers& barriers = device::shared_variable<Barriers>();
  const int tiles = (a.n[0] + kRows - 1) / kRows;
  if (threadIdx.x == 0) {
    if (kMistake != kNoInit) device::mbarrier_init(&barriers.query, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      device::mbarrier_init(&barriers.full[stage], 1);
      device::mbarrier_init(&barriers.empty[stage], kConsumerWarps);
    }
    if (kMistake != kNoMbarrierFence) device::fence_mbarrier_init();
  }
  if (kMistake != kNoBarrierAfterInit) device::sync_block();
  if (threadIdx.x < device::kWarpgroupSize) {
    if (kMistake != kNoDecrease && (kMistake != kOneWarpDecreases || threadIdx.x < 32)) {
      device::decrease_registers<24>();
    }
    if (threadIdx.x < (kMistake == kTwoProducers ? 2 : 1)) produce<kMistake>(a, barriers, tiles);
  } else {
    device::increase_registers<kMistake == kIncreasesToFewer ? 64 : 256>();
    consume<kMistake>(a, barriers, tiles);
  }
}

}  // namespace fastgen::kernels::chain
