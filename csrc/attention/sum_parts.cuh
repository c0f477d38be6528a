// Where several blocks shared a sum of the mask's gradient, its last step.
#pragma once

#include "attention/mask_result.cuh"

namespace fastgen::attention {

constexpr int kSumThreads = 256;

// Adds the parts of each element in their order: the same bits whatever block finished first.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) attention_sum_parts(MaskGradient gradient) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x, size = elements(gradient);
  if (at >= size) return;
  float sum = 0.0f;
  for (int i = 0; i < gradient.splits; ++i) sum += gradient.parts[i * size + at];
  store_gradient<T>(gradient, at, sum);
}

}  // namespace fastgen::attention
