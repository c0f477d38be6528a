// Bugs that a checker easily misses, each next to the correct kernel.
#pragma once

#include <cstring>

#include "device/barrier.cuh"
#include "device/mma.cuh"
#include "device/vector.cuh"
#include "device/warp.cuh"
#include "kernels/registry.h"

namespace fastgen::kernels::pitfalls {

enum Mistake {
  kNone,
  kCopiesUnordered,
  kCopiesTooMuch,
  kFillsTooMuch,
  kHelperInBranches,
  kProductInBranches,
  kVotesDiffer,
  kReadsWhatAnotherBlockWrites,
  kReachesNextVariable,
  kMisalignedStruct,
  kEndlessLocals,
  kPastRegisters,
  kUnwrittenAccumulator,
  kUnwrittenOperand,
  kStoresUnwritten,
  kFarPastEnd,
};

constexpr int kThreads = 32;

struct Tile {
  alignas(16) uint32_t words[4 * kThreads];
};
struct Other {
  uint32_t words[64 * kThreads];
};
struct alignas(16) Wide {
  uint32_t words[8];
};

__device__ __forceinline__ void helper() { device::sync_block(); }
__device__ __forceinline__ float product() {
  float d[4] = {};
  const uint32_t left[4] = {}, right[2] = {};
  device::mma_m16n8k16<Half>(d, left, right);
  return d[0];
}

// Stack overflow by unbounded recursion.
__attribute__((noinline)) static __device__ uint32_t deep(uint32_t n, uint32_t limit) {
  volatile uint32_t block[1024];
  block[n % 1024] = n;
  return n == limit ? block[n % 1024] : deep(n + 1, limit) + block[n % 1024];
}

// in: 160 words; out: 32 words for each of two blocks, then 32 more: the first 32 of in, then those of the next 32.
template <Mistake kMistake>
__global__ void kernel(Arguments a) {
  Tile& tile = device::shared_variable<Tile>();
  Other& other = device::shared_variable<Other>();
  const int thread = threadIdx.x;
  uint32_t* out = results(a) + blockIdx.x * kThreads;
  for (int i = thread; i < 64 * kThreads; i += kThreads) other.words[i] = 0;
  for (int i = 0; i < 4; ++i) tile.words[4 * thread + i] = words(a)[blockIdx.x * kThreads + thread];
  if (kMistake != kCopiesUnordered) device::sync_block();
  uint32_t copy[4 * kThreads];
  memcpy(copy, tile.words, sizeof(copy));
  uint32_t word = copy[4 * thread] + other.words[0];
  if (kMistake == kHelperInBranches) {
    if (thread % 2 == 0) {
      out[thread] = 1;
      helper();
    } else {
      helper();
      out[thread] = 2;
    }
  }
  if (kMistake == kProductInBranches) {
    if (thread % 2 == 0) {
      out[thread] = 1;
      out[thread] = static_cast<uint32_t>(product());
    } else {
      out[thread] = static_cast<uint32_t>(2 + product());
    }
  }
  if (kMistake == kVotesDiffer) word += thread < 16 ? device::any_lane(word == 0) : device::all_lanes(word != 0);
  if (kMistake == kReachesNextVariable) word += tile.words[4 * kThreads + thread];
  if (kMistake == kMisalignedStruct) word += reinterpret_cast<const Wide*>(words(a) + 1)->words[2];
  if (kMistake == kPastRegisters) {
    uint32_t four[4] = {word, word, word, word};
    for (int i = 0; i <= static_cast<int>(words(a)[0] % 2 + 4); ++i) four[i] += i;
    word = four[thread % 4];
  }
  if (kMistake == kUnwrittenAccumulator || kMistake == kUnwrittenOperand) {
    float d[4];
    uint32_t left[4];
    const uint32_t right[2] = {};
    if (kMistake == kUnwrittenAccumulator || thread < 16) left[0] = left[1] = left[2] = left[3] = 0;
    if (kMistake == kUnwrittenOperand || thread < 16) d[0] = d[1] = d[2] = d[3] = 0.0f;
    device::mma_m16n8k16<Half>(d, left, right);
    word += static_cast<uint32_t>(d[0]);
  }
  if (kMistake == kStoresUnwritten && thread == 0) {
    uint32_t four[4];
    for (int i = 0; i < static_cast<int>(words(a)[0] % 2 + 2); ++i) four[i] = word;
    device::store_vector(results(a), four);
  }
  // Over the guard zones of the allocations, which were side by side once.
  if (kMistake == kFarPastEnd) word += words(a)[4096 + 64 * thread];
  if (kMistake == kEndlessLocals) word += deep(0, words(a)[0] | 1 << 30);
  out[thread] = word;
  if (kMistake == kReadsWhatAnotherBlockWrites) {
    for (int i = 0; i < 2; ++i) {
      if (blockIdx.x == 0) word += results(a)[2 * kThreads + i];
    }
    device::sync_block();
    if (blockIdx.x == 1 && thread < 2) results(a)[2 * kThreads + thread] = word;
    return;
  }
  if (thread == 0 && blockIdx.x == 0) {
    const int wanted = kThreads * 4;
    if (kMistake == kFillsTooMuch) memset(results(a) + 2 * kThreads, 0, 2 * wanted);
    memcpy(results(a) + 2 * kThreads, words(a) + kThreads, kMistake == kCopiesTooMuch ? 4 * wanted : wanted);
  }
}

}  // namespace fastgen::kernels::pitfalls
