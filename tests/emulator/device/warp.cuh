// Host twin of csrc/device/warp.cuh.
#pragma once

#include "device/language.h"

namespace fastgen::device {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

template <typename T>
__forceinline__ T shuffle_as(emulator::Shuffle mode, T value, int operand, unsigned mask, emulator::Where where) {
  static_assert(sizeof(T) == 4, "a shuffle moves 4 bytes");
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  bits = emulator::shuffle(mode, mask, bits, operand, where);
  __builtin_memcpy(&value, &bits, sizeof(bits));
  return value;
}
template <typename T>
__forceinline__ T shuffle_xor(T value, int lane_mask, unsigned mask = kFullMask, FASTGEN_WHERE) {
  return shuffle_as(emulator::Shuffle::kXor, value, lane_mask, mask, where);
}
template <typename T>
__forceinline__ T shuffle_up(T value, int distance, unsigned mask = kFullMask, FASTGEN_WHERE) {
  return shuffle_as(emulator::Shuffle::kUp, value, distance, mask, where);
}
template <typename T>
__forceinline__ T shuffle_down(T value, int distance, unsigned mask = kFullMask, FASTGEN_WHERE) {
  return shuffle_as(emulator::Shuffle::kDown, value, distance, mask, where);
}
template <typename T>
__forceinline__ T shuffle(T value, int source, unsigned mask = kFullMask, FASTGEN_WHERE) {
  return shuffle_as(emulator::Shuffle::kIndex, value, source, mask, where);
}

__forceinline__ unsigned ballot(bool predicate, unsigned mask = kFullMask, FASTGEN_WHERE) {
  return emulator::vote(emulator::Vote::kBallot, mask, predicate, where);
}
__forceinline__ bool any_lane(bool predicate, unsigned mask = kFullMask, FASTGEN_WHERE) {
  return emulator::vote(emulator::Vote::kAny, mask, predicate, where) != 0;
}
__forceinline__ bool all_lanes(bool predicate, unsigned mask = kFullMask, FASTGEN_WHERE) {
  return emulator::vote(emulator::Vote::kAll, mask, !predicate, where) == 0;
}

__forceinline__ void sync_warp(unsigned mask = kFullMask, FASTGEN_WHERE) { emulator::sync_warp(mask, where); }

__forceinline__ void hold_loads() {}

}  // namespace fastgen::device
