// Online softmax (Milakov and Gimelshein, 2018) of a fragment of 16 rows. A lane holds a quarter of rows g and g + 8;
// the four lanes of a row hold different keys.
#pragma once

#include <cmath>

#include "attention/mask.cuh"
#include "common/math.h"
#include "device/math.cuh"
#include "device/warp.cuh"

namespace fastgen::attention {

// What is subtracted from the scores of a row whose maximum is ``top``, both in units of log2. 0 if the row has no
// unmasked key yet: -inf - -inf is NaN. An infinite maximum is NaN, also where the product with the factor overflows,
// and the multiply-add would not.
__device__ __forceinline__ float softmax_shift(float top) {
  return top == -INFINITY ? 0.0f : top == INFINITY ? NAN : top;
}

struct Softmax {
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0.0f, 0.0f};  // over this lane's keys; finalize() reduces over the row

  // scores = exp2(factor * scores - row_max), with the maximum updated. ``factor`` is positive. ``rescale``: the factor
  // for earlier weights and sums.
  template <int kTiles>
  __device__ __forceinline__ void update(float (&scores)[kTiles][4], float factor, float (&rescale)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = -INFINITY;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        top = fmaxf(top, fmaxf(scores[tile][2 * half], scores[tile][2 * half + 1]));
      }
      top = fmaxf(top, device::shuffle_xor(top, 1));
      top = fmaxf(top, device::shuffle_xor(top, 2));
      top = fmaxf(row_max[half], factor * top);
      const float shift = softmax_shift(top);
      rescale[half] = device::exp2_approx(row_max[half] - shift);
      row_max[half] = top;
      float sum = row_sum[half] * rescale[half];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[tile][i] = device::exp2_approx(fmaf(scores[tile][i], factor, -shift));
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

// What weight() subtracts, from a logsumexp in units of log2.
__device__ __forceinline__ float weight_shift(float lse) { return lse < kLowestLse ? INFINITY : lse; }

// P = exp2(factor * score - lse). 0 for a fully masked row, and in derivatives also for a row whose keys are masked by
// large negative finite values: there ``shift`` is infinite.
__device__ __forceinline__ float weight(float score, float factor, float shift) {
  return device::exp2_approx(fmaf(score, factor, -shift));
}

// values = 0 where the weight is 0, even if they are inf or NaN.
template <int kFragments, int kTiles>
__device__ __forceinline__ void clear_where_zero(float (&values)[kFragments][kTiles][4],
                                                 const float (&weights)[kFragments][kTiles][4]) {
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[m][tile][i] = weights[m][tile][i] == 0.0f ? 0.0f : values[m][tile][i];
    }
  }
}

}  // namespace fastgen::attention
