// The running softmax of 16 rows of a warp, of which a lane has a part of two: g and g + 8. The four lanes of a row
// have different keys. (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.)
#pragma once

#include <cmath>

#include "attention/mask.cuh"
#include "common/math.h"
#include "device/math.cuh"
#include "device/warp.cuh"

namespace fastgen::attention {

struct Softmax {
  float largest[2] = {-INFINITY, -INFINITY};
  float total[2] = {0.0f, 0.0f};  // of this lane's keys; finish() adds the others'

  // Scores become weights relative to the largest score so far. ``shrink``: what earlier weights have to be multiplied
  // with.
  template <int kTiles>
  __device__ __forceinline__ void step(float (&scores)[kTiles][4], float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = largest[half];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        top = fmaxf(top, fmaxf(scores[tile][2 * half], scores[tile][2 * half + 1]));
      }
      top = fmaxf(top, device::shuffle_xor(top, 1));
      top = fmaxf(top, device::shuffle_xor(top, 2));
      // A row that has seen no key yet has -inf here, and -inf - -inf is no number.
      const float shift = top == -INFINITY ? 0.0f : top;
      shrink[half] = device::exp2_approx(largest[half] - shift);
      largest[half] = top;
      float sum = total[half] * shrink[half];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[tile][i] = device::exp2_approx(scores[tile][i] - shift);
          sum += scores[tile][i];
        }
      }
      total[half] = sum;
    }
  }

  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += device::shuffle_xor(total[half], 1);
      total[half] += device::shuffle_xor(total[half], 2);
    }
  }

  // Of a row that sees no key: 0, and -inf. NaN passes through both.
  __device__ __forceinline__ float inverse(int half) const { return total[half] == 0.0f ? 0.0f : 1.0f / total[half]; }
  __device__ __forceinline__ float lse(int half) const {
    if (!(total[half] > 0.0f)) return total[half] == 0.0f ? -INFINITY : total[half];
    return largest[half] * kLn2 + log_float(total[half]);
  }
};

// Below this the logsumexp of a row, in units of log2, has no digits left for the number of its keys.
constexpr float kLowestLse = -16777216.0f;

// A weight again, from its score and its row's logsumexp, both in units of log2. A row without keys has 0, and so does,
// in derivatives, a row whose keys a mask hides by huge finite numbers.
__device__ __forceinline__ float weight(float score, float lse) {
  return lse < kLowestLse ? 0.0f : device::exp2_approx(score - lse);
}

}  // namespace fastgen::attention
