// Stores the gradient of a mask, and reduces the partial sums of blocks that share a tile of it.
#pragma once

#include "attention/params.h"
#include "device/barrier.cuh"
#include "device/convert.cuh"
#include "device/shared.cuh"

namespace fastgen::attention {

FASTGEN_HOST_DEVICE int64_t elements(const MaskGradient& gradient) {
  return int64_t{gradient.sizes[0]} * gradient.sizes[1] * gradient.sizes[2] * gradient.sizes[3];
}

// T: the query's storage type.
template <typename T>
__device__ __forceinline__ void store_gradient(const MaskGradient& gradient, int64_t at, float value) {
  if (gradient.kind == MaskKind::kFloat32) {
    static_cast<float*>(gradient.data)[at] = value;
  } else {
    static_cast<T*>(gradient.data)[at] = device::from_float<T>(value);
  }
}

constexpr int kSumThreads = 256;
constexpr int kPartsPerThread = 8;              // where there are threads to spare
constexpr int64_t kSumThreadsEnough = 1 << 16;  // of the grid: more would not read faster

// Threads that share an element: a power of two, 1 where there are many elements or few parts.
constexpr int sum_team(int64_t elements, int parts) {
  int team = 1;
  while (team < kSumThreads && team * kPartsPerThread < parts && elements * team < kSumThreadsEnough) team *= 2;
  return team;
}

struct TeamSums {
  float of[kSumThreads];
};

// Adds the parts of each element. Thread i of a team adds parts i, i + team, ..., then the team's sums are added in a
// tree, so that the result does not depend on which block finished first.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) attention_sum_parts(MaskGradient gradient, int team) {
  TeamSums& sums = device::shared_variable<TeamSums>();
  const int own = kSumThreads / team, thread = static_cast<int>(threadIdx.x), member = thread / own;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * own + thread % own, size = elements(gradient);
  float sum = 0.0f;
  if (at < size) {
#pragma unroll 4
    for (int i = member; i < gradient.splits; i += team) sum += gradient.parts[i * size + at];
  }
  for (int half = team / 2; half > 0; half /= 2) {
    if (member < 2 * half) sums.of[thread] = sum;
    device::sync_block();
    if (member < half) sum += sums.of[thread + half * own];
  }
  if (member == 0 && at < size) store_gradient<T>(gradient, at, sum);
}

}  // namespace fastgen::attention
