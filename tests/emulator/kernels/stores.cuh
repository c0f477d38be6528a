// A sample kernel that writes tiles from shared memory to an output by tensor stores, through a ring of two stages. Its
// template parameter plants one bug.
#pragma once

#include "device/barrier.cuh"
#include "device/fence.cuh"
#include "device/tensor_copy.cuh"
#include "kernels/registry.h"

namespace fastgen::kernels::stores {

enum Mistake {
  kNone,
  // Proxies
  kNoProxyFence,
  kProxyFenceTooEarly,
  kOneThreadFences,
  kWritesTargetBefore,
  kLoadsItsWrites,
  // Waits for the reads of a tile
  kNoBarrierBeforeStore,
  kNoWaitForStage,
  kNoBarrierAfterWait,
  kWaitsForTooFew,
  kOtherThreadWaits,
  kNoCommit,
  kWaitsBeforeCommit,
  kWritesTileAtOnce,
  kNoCommitOfLast,
  kEndsBeforeRead,
  // Waits for the writes of a box
  kNoLastWait,
  kWaitsForReadsOnly,
  kNoBarrierAfterLastWait,
  kOverwritesTarget,
  kStoresTwice,
  kForgetsBlock,
  // Tiles and boxes
  kMisalignedTile,
  kThirdStage,
  kUnwrittenRow,
  kUnswizzledWrite,
  kOneRowDown,
  kStoresInput,
};

constexpr int kThreads = 64, kStages = 2, kBlockTiles = 4, kRows = 8, kRowWords = 32, kTileBytes = kRows * 128;
constexpr int kOutWords = kRowWords + 4;

struct LoadBarrier {
  device::Mbarrier barrier;
};

// The words of in[0] plus one, in rows from ``first`` on.
template <Mistake kMistake>
__device__ __forceinline__ void fill(const Arguments& a, unsigned char* tile, int first) {
  for (int word = threadIdx.x; word < kRows * kRowWords; word += kThreads) {
    const int row = word / kRowWords, swizzled = kMistake == kUnswizzledWrite ? word : word ^ (row & 7) << 2;
    if (first + row >= a.n[0] || (kMistake == kUnwrittenRow && row == 3)) continue;
    reinterpret_cast<uint32_t*>(tile)[swizzled] = words(a)[first * kRowWords + word] + 1;
  }
}

template <Mistake kMistake>
__device__ __forceinline__ void start_store(const MappedArguments& a, const unsigned char* tile, int first, bool last) {
  const int at[] = {0, kMistake == kOneRowDown ? first + 1 : first, 0, 0};
  if (kMistake == kWritesTargetBefore) results(a)[first * kOutWords] = 0;
  device::tensor_store(kMistake == kStoresInput ? a.maps[0] : a.out_map, at,
                       tile + (kMistake == kMisalignedTile ? 128 : 0));
  if (kMistake == kStoresTwice) device::tensor_store(a.out_map, at, tile);
  if (kMistake != kNoCommit && kMistake != kWaitsBeforeCommit && (kMistake != kNoCommitOfLast || !last)) {
    device::tensor_store_commit();
  }
  if (kMistake == kOverwritesTarget) results(a)[first * kOutWords] = 0;
}

// in: n[0] rows of 64 columns; out: n[0] rows of 72 columns, each as 32-bit words: those of in[0] plus one, then the
// first four of these once more, as the block finds them in the output.
template <Mistake kMistake>
__global__ void __launch_bounds__(kThreads, 1) kernel(const __grid_constant__ MappedArguments a) {
  unsigned char* tiles = device::dynamic_shared();
  const int thread = threadIdx.x;
  const int begin = (kMistake == kForgetsBlock ? 0 : static_cast<int>(blockIdx.x)) * kBlockTiles * kRows;
  const int rows = a.n[0] - begin < kBlockTiles * kRows ? a.n[0] - begin : kBlockTiles * kRows;
  if (kMistake == kLoadsItsWrites && thread == 0) {
    device::Mbarrier* barrier = &device::shared_variable<LoadBarrier>().barrier;
    device::mbarrier_init(barrier, 1);
    device::fence_mbarrier_init();
    results(a)[begin * kOutWords] = 0;
    const int at[] = {0, begin, 0, 0};
    device::mbarrier_arrive_expect(barrier, kTileBytes);
    device::tensor_load(tiles, a.out_map, at, barrier);
    device::mbarrier_wait(barrier, 0);
  }
  for (int i = 0; i < kBlockTiles; ++i) {
    const int first = begin + i * kRows;
    unsigned char* tile = tiles + i % kStages * kTileBytes;
    if (thread == (kMistake == kOtherThreadWaits ? 32 : 0)) {
      if (kMistake != kNoWaitForStage) device::tensor_store_wait_read<kMistake == kWaitsForTooFew ? 2 : 1>();
      if (kMistake == kWaitsBeforeCommit) device::tensor_store_commit();
    }
    if (kMistake != kNoBarrierAfterWait) device::sync_block();
    if (kMistake == kProxyFenceTooEarly) device::fence_async_proxy();
    fill<kMistake>(a, tile, first);
    if (kMistake != kNoProxyFence && kMistake != kProxyFenceTooEarly && (kMistake != kOneThreadFences || thread == 0)) {
      device::fence_async_proxy();
    }
    if (kMistake != kNoBarrierBeforeStore) device::sync_block();
    if (thread == 0) {
      start_store<kMistake>(a, kMistake == kThirdStage ? tiles + i * kTileBytes : tile, first, i + 1 == kBlockTiles);
      if (kMistake == kWritesTileAtOnce) *reinterpret_cast<uint32_t*>(tile) = 0;
    }
  }
  if (kMistake == kEndsBeforeRead) return;
  if (thread == 0) {
    if (kMistake == kWaitsForReadsOnly) {
      device::tensor_store_wait_read<0>();
    } else if (kMistake != kNoLastWait) {
      device::tensor_store_wait<0>();
    }
  }
  if (kMistake == kNoCommitOfLast) return;
  if (kMistake != kNoBarrierAfterLastWait) device::sync_block();
  for (int i = thread; i < rows * 4; i += kThreads) {
    uint32_t* row = results(a) + (begin + i / 4) * kOutWords;
    row[kRowWords + i % 4] = row[i % 4];
  }
}

}  // namespace fastgen::kernels::stores
