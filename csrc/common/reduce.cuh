// Reductions over a warp and a block, in a fixed order for a given launch configuration.
#pragma once

#include "device/barrier.cuh"
#include "device/shared.cuh"
#include "device/warp.cuh"

namespace fastgen {

// The sum over each aligned team of ``team`` lanes (a power of two, at most 32), in every lane of the team.
__device__ __forceinline__ float team_sum(float value, int team) {
  for (int offset = team / 2; offset > 0; offset /= 2) {
    value += device::shuffle_xor(value, offset);
  }
  return value;
}

template <int kWarps>
struct WarpSums {
  float of[kWarps];
};

// The sum over a block of kThreads threads, in thread 0. At most once per kernel: a second call would need a barrier.
template <int kThreads>
__device__ __forceinline__ float block_sum(float value) {
  constexpr int kWarps = kThreads / device::kWarpSize;
  static_assert(kWarps >= 1 && kWarps <= device::kWarpSize, "one warp adds the sums of all warps");
  WarpSums<kWarps>& sums = device::shared_variable<WarpSums<kWarps>>();
  const int lane = threadIdx.x % device::kWarpSize, warp = threadIdx.x / device::kWarpSize;
  value = team_sum(value, device::kWarpSize);
  if (lane == 0) sums.of[warp] = value;
  device::sync_block();
  value = lane < kWarps ? sums.of[lane] : 0.0f;
  return warp == 0 ? team_sum(value, device::kWarpSize) : 0.0f;
}

}  // namespace fastgen
