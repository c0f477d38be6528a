// Stores the gradient of a mask, and reduces the partial sums of blocks that share a tile of it.
#pragma once

#include "attention/params.h"
#include "device/convert.cuh"

namespace fastgen::attention {

FASTGEN_HOST_DEVICE int64_t elements(const MaskGradient& gradient) {
  return int64_t{gradient.sizes[0]} * gradient.sizes[1] * gradient.sizes[2] * gradient.sizes[3];
}

// T: the query's storage type.
template <typename T>
__device__ __forceinline__ void store_gradient(const MaskGradient& gradient, int64_t at, float value) {
  if (gradient.kind == MaskKind::kFloat32) {
    static_cast<float*>(gradient.data)[at] = value;
  } else {
    static_cast<T*>(gradient.data)[at] = device::from_float<T>(value);
  }
}

constexpr int kSumThreads = 256;

// One thread per element adds its parts in order, so that the result does not depend on which block finished first.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) attention_sum_parts(MaskGradient gradient) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x, size = elements(gradient);
  if (at >= size) return;
  float sum = 0.0f;
  for (int i = 0; i < gradient.splits; ++i) sum += gradient.parts[i * size + at];
  store_gradient<T>(gradient, at, sum);
}

}  // namespace fastgen::attention
