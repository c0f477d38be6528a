// Host twin of csrc/device/convert.cuh.
#pragma once

#include "common/cpu/convert.h"
#include "device/language.h"

namespace fastgen::device {

using cpu::from_float;
using cpu::to_float;

template <typename T>
__forceinline__ uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
}

__forceinline__ uint32_t to_tf32(float value) {
  const uint32_t bits = float_to_bits(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  if (value != value) return 0x7fffffffu;
  return (finite ? bits + 0x1000u : bits) & 0xffffe000u;
}

}  // namespace fastgen::device
