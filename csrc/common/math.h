// Elementary functions in float32, within about 1 ulp, without branches, so that compilers vectorise them.
// Minimax coefficients: Moshier, Cephes mathematical library (single precision).
#pragma once

#include <cmath>

#include "common/types.h"

namespace fastgen {

// e^x. NaN passes through; overflow gives inf, underflow 0.
FASTGEN_HOST_DEVICE float exp_float(float x) {
  constexpr float kLog2e = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  // Comparisons with NaN are false, so NaN is left alone. The bounds lie beyond overflow and underflow.
  x = x > 89.0f ? 89.0f : x;
  x = x < -104.0f ? -104.0f : x;
  const float n = rintf(x * kLog2e);
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^n in two factors: n reaches from -150 to 128, beyond one exponent field. NaN takes n = 0.
  const int32_t exponent = static_cast<int32_t>(n == n ? n : 0.0f);
  const int32_t half = exponent >> 1;
  const float scale0 = bits_to_float(static_cast<uint32_t>(half + 127) << 23);
  const float scale1 = bits_to_float(static_cast<uint32_t>(exponent - half + 127) << 23);
  return p * scale0 * scale1;
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
  p = p - 2.12194440e-4f * e;
  p = p - 0.5f * z;
  return (f + p) + 0.693359375f * e;
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
