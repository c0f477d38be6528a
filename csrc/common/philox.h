// Counter-based random numbers: functions of a seed and a logical position. fastgen/random.py is the PyTorch
// implementation; uniforms are bitwise equal, normals to a few ulp.
#pragma once

#include "common/math.h"
#include "common/types.h"

namespace fastgen {

constexpr uint32_t kNoiseStream = 0;
constexpr uint32_t kDropoutStream = 1;

// Elements per counter. Rows start at group boundaries.
constexpr int kGroup = 4;

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxIncrement0 = 0x9E3779B9u, kPhiloxIncrement1 = 0xBB67AE85u;

struct Philox4 {
  uint32_t x[kGroup];
};

// Philox4x32-10 (Salmon et al., SC 2011): key = seed, counter = (index, stream).
FASTGEN_HOST_DEVICE Philox4 philox(uint64_t seed, uint64_t index, uint32_t stream) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32);
  uint32_t c2 = stream, c3 = 0;
  FASTGEN_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += kPhiloxIncrement0;
    key1 += kPhiloxIncrement1;
  }
  return {{c0, c1, c2, c3}};
}

// u = (x + 0.5) 2^-32, in (0, 1].
FASTGEN_HOST_DEVICE float to_uniform(uint32_t bits) { return static_cast<float>(bits) * 0x1p-32f + 0x1p-33f; }

// Two standard normals (Box and Muller, 1958). The angle is reduced exactly, in units of pi, so that results near zero
// keep their relative accuracy.
FASTGEN_HOST_DEVICE void box_muller(float u0, float u1, float& n0, float& n1) {
  const float radius = sqrtf(-2.0f * log_float(u0));
  const float angle = 2.0f * u1;
  const float shifted = 2.0f * angle + kRound;
  const float rounded = shifted - kRound;
  const float rest = 3.14159265358979324f * (angle - 0.5f * rounded);
  const uint32_t quadrant = float_to_bits(shifted) & 3u;
  const float sine = sin_quarter(rest), cosine = cos_quarter(rest);
  const bool odd = (quadrant & 1u) != 0;
  const float cos_abs = odd ? sine : cosine, sin_abs = odd ? cosine : sine;
  // cos is negative in quadrants 1 and 2, sin in 2 and 3.
  const uint32_t cos_sign = ((quadrant + 1u) & 2u) << 30, sin_sign = (quadrant & 2u) << 30;
  n0 = radius * bits_to_float(float_to_bits(cos_abs) ^ cos_sign);
  n1 = radius * bits_to_float(float_to_bits(sin_abs) ^ sin_sign);
}

// Four standard normals of one group.
FASTGEN_HOST_DEVICE void normal_group(uint64_t seed, uint64_t index, float* noise) {
  const Philox4 bits = philox(seed, index, kNoiseStream);
  box_muller(to_uniform(bits.x[0]), to_uniform(bits.x[1]), noise[0], noise[1]);
  box_muller(to_uniform(bits.x[2]), to_uniform(bits.x[3]), noise[2], noise[3]);
}

}  // namespace fastgen
