// Warp-level primitives: shuffles, votes, barrier.
#pragma once

#include <cuda_runtime.h>

namespace fastgen::device {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// Shuffles exchange 4-byte values between the lanes of ``mask``, all of which must participate. They do not order
// memory. A lane whose source is outside the warp receives its own value. PTX ISA, "shfl.sync" (.bfly, .up, .down,
// .idx).
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int lane_mask, unsigned mask = kFullMask) {
  static_assert(sizeof(T) == 4, "a shuffle moves 4 bytes");
  return __shfl_xor_sync(mask, value, lane_mask);
}
template <typename T>
__device__ __forceinline__ T shuffle_up(T value, int distance, unsigned mask = kFullMask) {
  static_assert(sizeof(T) == 4, "a shuffle moves 4 bytes");
  return __shfl_up_sync(mask, value, distance);
}
template <typename T>
__device__ __forceinline__ T shuffle_down(T value, int distance, unsigned mask = kFullMask) {
  static_assert(sizeof(T) == 4, "a shuffle moves 4 bytes");
  return __shfl_down_sync(mask, value, distance);
}
// The value of lane ``source % 32``.
template <typename T>
__device__ __forceinline__ T shuffle(T value, int source, unsigned mask = kFullMask) {
  static_assert(sizeof(T) == 4, "a shuffle moves 4 bytes");
  return __shfl_sync(mask, value, source);
}

// Votes over the lanes of ``mask``, all of which must participate. PTX ISA, "vote.sync" (.ballot, .any, .all).
__device__ __forceinline__ unsigned ballot(bool predicate, unsigned mask = kFullMask) {
  return __ballot_sync(mask, predicate);
}
__device__ __forceinline__ bool any_lane(bool predicate, unsigned mask = kFullMask) {
  return __any_sync(mask, predicate) != 0;
}
__device__ __forceinline__ bool all_lanes(bool predicate, unsigned mask = kFullMask) {
  return __all_sync(mask, predicate) != 0;
}

// Barrier of the lanes of ``mask``; earlier memory accesses become visible among them. PTX ISA, "bar.warp.sync".
__device__ __forceinline__ void sync_warp(unsigned mask = kFullMask) { __syncwarp(mask); }

// A scheduling hint without guaranteed semantics: ptxas does not move loads of shared memory across it, which limits
// the live range of their registers.
__device__ __forceinline__ void hold_loads() { __syncwarp(); }

}  // namespace fastgen::device
