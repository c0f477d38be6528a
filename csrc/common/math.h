// Elementary functions in float32, accurate to about 1 ulp and branch-free, so that compilers vectorize them.
// Minimax coefficients: Moshier, Cephes mathematical library (single precision).
#pragma once

#include <cmath>

#include "common/types.h"

namespace fastgen {

// Adding and subtracting it rounds a float below 2^22 to an integer; the low bits of the sum hold that integer.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23

// Returns e^x; outputs expm1 = e^x - 1 and excess = e^x - 1 - x >= 0. Each has a relative error of a few ulp, also near
// 0. NaN propagates; overflow gives inf, subnormal results are flushed to 0.
FASTGEN_HOST_DEVICE float exponentials(float x, float& expm1, float& excess) {
  constexpr float kLog2e = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kLargest = 88.7228394f, kSmallest = -87.3365479f;
  const float shifted = x * kLog2e + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float tail = p * (r * r);
  p = tail + r + 1.0f;
  // p is in (0.7, 1.5): n is added to the exponent, which cannot overflow within the bounds.
  float result = bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23));
  result = x >= kLargest ? INFINITY : result;
  result = x <= kSmallest ? 0.0f : result;
  result = x == x ? result : x;
  // n = 0: |x| < 0.35, r = x, and there is no cancellation. Elsewhere e^x - 1 and x are well separated.
  const bool small = n == 0.0f;
  expm1 = small ? tail + r : result - 1.0f;
  excess = small ? tail : (result - 1.0f) - x;
  return result;
}

FASTGEN_HOST_DEVICE float exp_float(float x) {
  float expm1, excess;
  return exponentials(x, expm1, excess);
}

// ln x for normal x > 0. Exactly 0 at 1.
FASTGEN_HOST_DEVICE float log_float(float x) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;
  const uint32_t shifted = float_to_bits(x) - kSqrtHalf;
  const float e = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float f = bits_to_float((shifted & 0x007fffffu) + kSqrtHalf) - 1.0f;  // in [sqrt(1/2), sqrt(2)) - 1
  const float z = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = p * f * z;
  p = p - 0.5f * z;
  return (f + p) + 0.693147180559945f * e;
}

// sin and cos of x in [-pi/4, pi/4].
FASTGEN_HOST_DEVICE float sin_quarter(float x) {
  const float z = x * x;
  const float p = (-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f;
  return p * z * x + x;
}

FASTGEN_HOST_DEVICE float cos_quarter(float x) {
  const float z = x * x;
  const float p = (2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f;
  return p * z * z - 0.5f * z + 1.0f;
}

}  // namespace fastgen
