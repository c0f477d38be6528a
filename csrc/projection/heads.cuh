// Normalised and turned heads: a warp has one head of one token, a lane two channels of every 64. Formulas:
// fastgen/reference.py, rms_norm and rotary.
#pragma once

#include <cmath>

#include "common/reduce.cuh"
#include "device/convert.cuh"
#include "device/warp.cuh"
#include "projection/matrix.cuh"

namespace fastgen::projection {

// What a channel is turned with: itself and its partner, as own * cos + partner * sin.
struct Turn {
  int partner;
  float cos, sin;
};

__device__ __forceinline__ Turn turn_of(const HeadFinish& finish, const Place& place, int channel) {
  const bool second = finish.interleaved ? channel % 2 != 0 : channel >= finish.half;
  const int pair = finish.interleaved ? channel / 2 : channel - (second ? finish.half : 0);
  const int apart = finish.interleaved ? 1 : finish.half;
  const int64_t at = place.sequence * finish.table_batch + static_cast<int64_t>(place.position) * finish.half + pair;
  const float sin = finish.sin[at];
  return {second ? channel - apart : channel + apart, finish.cos[at], second ? sin : -sin};
}

// 1 / sqrt(mean(y^2) + eps) of a head of the staging, in every lane.
__device__ __forceinline__ float inverse_rms(const float* y, int dim, float eps) {
  float squares = 0.0f;
  for (int channel = static_cast<int>(threadIdx.x % 32); channel < dim; channel += 32) {
    squares += y[channel] * y[channel];
  }
  return 1.0f / sqrtf(team_sum(squares, device::kWarpSize) / static_cast<float>(dim) + eps);
}

// Writes a head: normalised where there is a norm, turned where ``turned``.
template <typename T>
__device__ __forceinline__ void store_head(const float* y, int dim, const void* norm, bool turned,
                                           const HeadFinish& finish, const Place& place, T* out, T* kept) {
  const float scale = norm == nullptr ? 1.0f : inverse_rms(y, dim, finish.eps);
  const auto normal = [&](int channel) {
    const float weight = norm == nullptr ? 1.0f : device::to_float(static_cast<const T*>(norm)[channel]);
    return y[channel] * scale * weight;
  };
  for (int channel = static_cast<int>(threadIdx.x % 32); channel < dim; channel += 32) {
    float value = normal(channel);
    if (turned && channel < 2 * finish.half) {
      const Turn turn = turn_of(finish, place, channel);
      value = value * turn.cos + normal(turn.partner) * turn.sin;
    }
    out[channel] = device::from_float<T>(value);
    if (kept != nullptr) kept[channel] = device::from_float<T>(y[channel]);
  }
}

}  // namespace fastgen::projection
