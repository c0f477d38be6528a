// Reduction of the KL of rows that were split among blocks.
#pragma once

#include "device/warp.cuh"

#include "latent/tiles.h"

namespace fastgen::latent {

// kl = half the sum of the parts of each row, in order, so that the result does not depend on which block finished
// first.
static __global__ void __launch_bounds__(kThreads)
    latent_sum_parts(const float* partial, float* kl, int64_t rows, int splits) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  float sum = 0.0f;
  for (int i = 0; i < splits; ++i) sum += partial[row * splits + i];
  kl[row] = 0.5f * sum;
}

}  // namespace fastgen::latent
