// Online softmax (Milakov and Gimelshein, 2018) of a fragment of 16 rows. A lane holds a quarter of rows g and g + 8;
// the four lanes of a row hold different keys.
#pragma once

#include <cmath>

#include "attention/mask.cuh"
#include "common/math.h"
#include "device/math.cuh"
#include "device/warp.cuh"

namespace fastgen::attention {

struct Softmax {
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0.0f, 0.0f};  // over this lane's keys; finalize() reduces over the row

  // scores = exp2(scores - row_max), with the maximum updated. ``rescale``: the factor for earlier weights and sums.
  template <int kTiles>
  __device__ __forceinline__ void update(float (&scores)[kTiles][4], float (&rescale)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = row_max[half];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        top = fmaxf(top, fmaxf(scores[tile][2 * half], scores[tile][2 * half + 1]));
      }
      top = fmaxf(top, device::shuffle_xor(top, 1));
      top = fmaxf(top, device::shuffle_xor(top, 2));
      // -inf if the row has no unmasked key yet, and -inf - -inf is NaN.
      const float shift = top == -INFINITY ? 0.0f : top;
      rescale[half] = device::exp2_approx(row_max[half] - shift);
      row_max[half] = top;
      float sum = row_sum[half] * rescale[half];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[tile][i] = device::exp2_approx(scores[tile][i] - shift);
          sum += scores[tile][i];
        }
      }
      row_sum[half] = sum;
    }
  }

  __device__ __forceinline__ void finalize() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row_sum[half] += device::shuffle_xor(row_sum[half], 1);
      row_sum[half] += device::shuffle_xor(row_sum[half], 2);
    }
  }

  // A fully masked row has inverse 0 and lse -inf. NaN propagates through both.
  __device__ __forceinline__ float inverse(int half) const {
    return row_sum[half] == 0.0f ? 0.0f : 1.0f / row_sum[half];
  }
  __device__ __forceinline__ float lse(int half) const {
    if (!(row_sum[half] > 0.0f)) return row_sum[half] == 0.0f ? -INFINITY : row_sum[half];
    return row_max[half] * kLn2 + log_float(row_sum[half]);
  }
};

// Below this a logsumexp in units of log2 has no precision left for the number of keys.
constexpr float kLowestLse = -16777216.0f;

// P = exp2(score - lse), both in units of log2. 0 for a fully masked row, and in derivatives also for a row whose keys
// are masked by large negative finite values.
__device__ __forceinline__ float weight(float score, float lse) {
  return lse < kLowestLse ? 0.0f : device::exp2_approx(score - lse);
}

}  // namespace fastgen::attention
