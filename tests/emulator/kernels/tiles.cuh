// Sample kernels that copy asynchronously and multiply matrices. Each has a template parameter that plants one bug.
#pragma once

#include "device/barrier.cuh"
#include "device/copy.cuh"
#include "device/mma.cuh"
#include "device/warp.cuh"
#include "kernels/registry.h"

namespace fastgen::kernels {

namespace product {

enum Mistake {
  kNone,
  kNoWait,
  kWaitsForTooFew,
  kNoCommit,
  kNoBarrierAfterWait,
  kNoBarrierAtEnd,
  kReadsPastTail,
  kSkipsTail,
  kOddStride,
  kThirdStage,
  kHalfWarp,
  kNotTransposed,
  kWrongLanes,
  kSwapsRows,
};

constexpr int kThreads = 128, kRows = 64, kColumns = 64, kDepth = 32, kStages = 2, kChunk = 16;
// A row stride with 16 bytes of padding, so that ldmatrix has no bank conflicts.
constexpr int kLeftStride = kDepth * 2 + kChunk, kRightStride = kColumns * 2 + kChunk;
constexpr int kLeftBytes = kRows * kLeftStride, kStageBytes = kLeftBytes + kDepth * kRightStride;
constexpr int kSharedBytes = kStages * kStageBytes;

// C (64, 64) = A (64, depth) B (depth, 64), float16 to float32; n[0]: depth, a multiple of 8. One block of 4 warps,
// each with 16 rows of C; tiles of A and B arrive in a ring of two stages.
template <Mistake kMistake>
__global__ void kernel(Arguments a) {
  unsigned char* shared = device::dynamic_shared();
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, depth = a.n[0];
  const auto* left = static_cast<const uint16_t*>(a.in[0]);
  const auto* right = static_cast<const uint16_t*>(a.in[1]);
  constexpr int kStride = kMistake == kOddStride ? kLeftStride - 8 : kLeftStride;

  const auto load = [&](int tile) {
    unsigned char* stage = shared + tile % (kMistake == kThirdStage ? 3 : kStages) * kStageBytes;
    constexpr int kLeftChunks = kDepth * 2 / kChunk, kRightChunks = kColumns * 2 / kChunk;
    for (int i = thread; i < kRows * kLeftChunks; i += kThreads) {
      const int row = i / kLeftChunks, chunk = i % kLeftChunks, k = tile * kDepth + chunk * 8;
      const int valid = k < depth || kMistake == kReadsPastTail ? kChunk : 0;
      if (kMistake == kSkipsTail && valid == 0) continue;
      device::async_copy<kChunk>(stage + row * kStride + chunk * kChunk, left + row * depth + k, valid);
    }
    for (int i = thread; i < kDepth * kRightChunks; i += kThreads) {
      const int row = i / kRightChunks, chunk = i % kRightChunks, k = tile * kDepth + row;
      const int valid = k < depth ? kChunk : 0;
      if (kMistake == kSkipsTail && valid == 0) continue;
      device::async_copy<kChunk>(stage + kLeftBytes + row * kRightStride + chunk * kChunk,
                                 right + k * kColumns + chunk * 8, valid);
    }
  };

  float sums[kColumns / 8][4] = {};
  const int tiles = (depth + kDepth - 1) / kDepth;
  load(0);
  if (kMistake != kNoCommit) device::async_copy_commit();
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) load(tile + 1);
    if (kMistake != kNoCommit) device::async_copy_commit();
    if constexpr (kMistake == kWaitsForTooFew) {
      device::async_copy_wait<2>();
    } else if constexpr (kMistake != kNoWait) {
      device::async_copy_wait<1>();
    }
    if (kMistake != kNoBarrierAfterWait || tile < kStages) device::sync_block();
    const unsigned char* stage = shared + tile % kStages * kStageBytes;
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t rows[4], columns[4];
      const int in_row = kMistake == kWrongLanes ? lane / 2 : lane % 16,
                half = kMistake == kWrongLanes ? lane % 2 : lane / 16;
      device::ldmatrix(rows, stage + (warp * 16 + in_row) * kStride + k * 2 + half * kChunk);
      for (int pair = 0; pair < kColumns / 16; ++pair) {
        const unsigned char* from =
            stage + kLeftBytes + (k + lane % 16) * kRightStride + (pair * 2 + lane / 16) * kChunk;
        if constexpr (kMistake == kNotTransposed) {
          device::ldmatrix(columns, from);
        } else {
          device::ldmatrix_trans(columns, from);
        }
        for (int i = 0; i < 2; ++i) {
          const uint32_t two[2] = {columns[2 * i], columns[2 * i + 1]};
          if (kMistake != kHalfWarp || lane < 16) device::mma_m16n8k16<Half>(sums[2 * pair + i], rows, two);
        }
      }
    }
    // All threads have read this stage before the next copy overwrites it.
    if (kMistake != kNoBarrierAtEnd) device::sync_block();
  }
  auto* out = static_cast<float*>(a.out);
  for (int column = 0; column < kColumns / 8; ++column) {
    for (int i = 0; i < 4; ++i) {
      const int row = warp * 16 + lane / 4 + i / 2 * 8;
      out[row * kColumns + column * 8 + lane % 4 * 2 + i % 2] = sums[column][kMistake == kSwapsRows ? i ^ 2 : i];
    }
  }
}

}  // namespace product

namespace scratch {

enum Mistake {
  kNone,
  kNoWait,
  kReadsBeforeWait,
  kOverwritesSource,
  kOverwritesTarget,
  kUnwrittenSource,
  kNoBarrier,
  kCopiesTwice,
};

constexpr int kThreads = 64;

struct Tile {
  alignas(16) uint32_t words[4 * kThreads];
};

// Each thread writes 4 words of scratch (the first half of out), copies them to shared memory, changes the scratch, and
// adds what its neighbor copied to the second half.
template <Mistake kMistake>
__global__ void kernel(Arguments a) {
  Tile& tile = device::shared_variable<Tile>();
  const int thread = threadIdx.x;
  uint32_t* scratch = results(a) + 4 * thread;
  for (int i = 0; i < 4; ++i) {
    if (kMistake != kUnwrittenSource) scratch[i] = words(a)[4 * thread + i];
  }
  device::async_copy<16>(tile.words + 4 * thread, scratch);
  if (kMistake == kCopiesTwice) device::async_copy<16>(tile.words + 4 * thread, scratch);
  if (kMistake == kOverwritesSource) scratch[3] = 0;
  if (kMistake == kOverwritesTarget) tile.words[4 * thread + 2] = 0;
  uint32_t early = 0;
  if (kMistake == kReadsBeforeWait) early = tile.words[4 * thread];
  if (kMistake != kNoWait) device::async_copy_wait_all();
  for (int i = 0; i < 4; ++i) scratch[i] = early;
  if (kMistake != kNoBarrier) device::sync_block();
  for (int i = 0; i < 4; ++i) {
    results(a)[4 * (kThreads + thread) + i] = tile.words[4 * ((thread + 1) % kThreads) + i];
  }
}

}  // namespace scratch

}  // namespace fastgen::kernels
