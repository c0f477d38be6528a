// QK-norm (RMS) and rotary embedding (RoPE) of heads: one warp per head of a token, lanes along the channels. Formulas:
// fastgen/reference.py, rms_norm and rotary.
#pragma once

#include <cmath>

#include "common/reduce.cuh"
#include "device/convert.cuh"
#include "device/warp.cuh"
#include "projection/matrix.cuh"

namespace fastgen::projection {

// Rotary embedding of one channel: own * cos + partner * sin.
struct Rotation {
  int partner;
  float cos, sin;
};

__device__ __forceinline__ Rotation rotation_of(const HeadEpilogue& epilogue, const Place& place, int channel) {
  const bool second = epilogue.interleaved ? channel % 2 != 0 : channel >= epilogue.half;
  const int pair = epilogue.interleaved ? channel / 2 : channel - (second ? epilogue.half : 0);
  const int apart = epilogue.interleaved ? 1 : epilogue.half;
  const int64_t at =
      place.sequence * epilogue.table_batch + static_cast<int64_t>(place.position) * epilogue.half + pair;
  const float sin = epilogue.sin[at];
  return {second ? channel - apart : channel + apart, epilogue.cos[at], second ? sin : -sin};
}

// 1 / sqrt(mean(y^2) + eps) of a staged head, in every lane.
__device__ __forceinline__ float inverse_rms(const float* y, int dim, float eps) {
  float squares = 0.0f;
  for (int channel = static_cast<int>(threadIdx.x % 32); channel < dim; channel += 32) {
    squares += y[channel] * y[channel];
  }
  return 1.0f / sqrtf(team_sum(squares, device::kWarpSize) / static_cast<float>(dim) + eps);
}

// Stores a head: with a norm, normalized; with ``rotate``, rotated. ``kept``: receives the head before the norm.
template <typename T>
__device__ __forceinline__ void store_head(const float* y, int dim, const void* norm, bool rotate,
                                           const HeadEpilogue& epilogue, const Place& place, T* out, T* kept) {
  const float scale = norm == nullptr ? 1.0f : inverse_rms(y, dim, epilogue.eps);
  const auto normalized = [&](int channel) {
    const float weight = norm == nullptr ? 1.0f : device::to_float(static_cast<const T*>(norm)[channel]);
    return y[channel] * scale * weight;
  };
  for (int channel = static_cast<int>(threadIdx.x % 32); channel < dim; channel += 32) {
    float value = normalized(channel);
    if (rotate && channel < 2 * epilogue.half) {
      const Rotation rotation = rotation_of(epilogue, place, channel);
      value = value * rotation.cos + normalized(rotation.partner) * rotation.sin;
    }
    out[channel] = device::from_float<T>(value);
    if (kept != nullptr) kept[channel] = device::from_float<T>(y[channel]);
  }
}

}  // namespace fastgen::projection
