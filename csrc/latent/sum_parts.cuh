// Where several blocks shared a row, the last step of its KL.
#pragma once

#include "device/warp.cuh"

#include "latent/config.h"

namespace fastgen::latent {

// kl = half the sum of each row's parts, in their order: the same bits whatever block finished first.
static __global__ void __launch_bounds__(kThreads)
    latent_sum_parts(const float* partial, float* kl, int64_t rows, int splits) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  float sum = 0.0f;
  for (int i = 0; i < splits; ++i) sum += partial[row * splits + i];
  kl[row] = 0.5f * sum;
}

}  // namespace fastgen::latent
