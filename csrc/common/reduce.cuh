// Sums over the lanes of a warp and the warps of a block, in an order that depends on the launch alone.
#pragma once

#include "device/barrier.cuh"
#include "device/shared.cuh"
#include "device/warp.cuh"

namespace fastgen {

// The sum over each aligned team of ``team`` lanes (a power of two, at most 32), in every lane of it.
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

// The sum over a block of kThreads threads, in thread 0. Once in a kernel: a second one would need a barrier before it.
template <int kThreads>
__device__ __forceinline__ float block_sum(float value) {
  constexpr int kWarps = kThreads / device::kWarpSize;
  static_assert(kWarps >= 1 && kWarps <= device::kWarpSize, "one warp adds the sums of the others");
  WarpSums<kWarps>& sums = device::shared_variable<WarpSums<kWarps>>();
  const int lane = threadIdx.x % device::kWarpSize, warp = threadIdx.x / device::kWarpSize;
  value = team_sum(value, device::kWarpSize);
  if (lane == 0) sums.of[warp] = value;
  device::sync_block();
  value = lane < kWarps ? sums.of[lane] : 0.0f;
  return warp == 0 ? team_sum(value, device::kWarpSize) : 0.0f;
}

}  // namespace fastgen
