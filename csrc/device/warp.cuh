// Threads of a warp: shuffles, votes, and the warp's barrier.
#pragma once

#include <cuda_runtime.h>

namespace fastgen::device {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// Shuffles exchange 4-byte values between the lanes of ``mask``, which must all take part. They order no memory.
// A lane whose source lies outside the warp gets its own value. PTX ISA, "shfl.sync" (.bfly, .up, .down, .idx).
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

// Over the lanes of ``mask``, which must all take part. PTX ISA, "vote.sync" (.ballot, .any, .all).
__device__ __forceinline__ unsigned ballot(bool predicate, unsigned mask = kFullMask) {
  return __ballot_sync(mask, predicate);
}
__device__ __forceinline__ bool any_lane(bool predicate, unsigned mask = kFullMask) {
  return __any_sync(mask, predicate) != 0;
}
__device__ __forceinline__ bool all_lanes(bool predicate, unsigned mask = kFullMask) {
  return __all_sync(mask, predicate) != 0;
}

// The lanes of ``mask`` have arrived, and see each other's memory. PTX ISA, "bar.warp.sync".
__device__ __forceinline__ void sync_warp(unsigned mask = kFullMask) { __syncwarp(mask); }

// Nothing that a kernel may count on: the assembler moves no load of shared memory across, so that what comes after
// does not take its registers before.
__device__ __forceinline__ void hold_loads() { __syncwarp(); }

}  // namespace fastgen::device
