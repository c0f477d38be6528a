// Conversion between storage types and float32, round to nearest even, branch-free so that it vectorizes.
#pragma once

#include "common/types.h"

namespace fastgen::cpu {

FASTGEN_HOST_DEVICE float to_float(float value) { return value; }

FASTGEN_HOST_DEVICE float to_float(BFloat16 value) { return bits_to_float(uint32_t{value.bits} << 16); }

FASTGEN_HOST_DEVICE float to_float(Half value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16, rest = value.bits & 0x7fffu;
  // The exponent moves from bias 15 to 127 by a product, which also makes subnormal numbers normal.
  const float finite = bits_to_float(rest << 13) * 0x1p112f;
  const uint32_t bits = rest >= 0x7c00u ? (rest << 13) | 0x7f800000u : float_to_bits(finite);
  return bits_to_float(bits | sign);
}

template <typename T>
T from_float(float value);

template <>
FASTGEN_HOST_DEVICE float from_float<float>(float value) {
  return value;
}

template <>
FASTGEN_HOST_DEVICE BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(value == value ? rounded : 0x7fc0u)};
}

template <>
FASTGEN_HOST_DEVICE Half from_float<Half>(float value) {
  const uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffffu;
  // Below 2^-14: adding 0.5 leaves the subnormal half's bits, rounded, at the bottom of the sum.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>(half | (bits >> 16 & 0x8000u))};
}

}  // namespace fastgen::cpu
