// How the gradient of a mask is stored.
#pragma once

#include "attention/params.h"
#include "device/convert.cuh"

namespace fastgen::attention {

FASTGEN_HOST_DEVICE int64_t elements(const MaskGradient& gradient) {
  return int64_t{gradient.sizes[0]} * gradient.sizes[1] * gradient.sizes[2] * gradient.sizes[3];
}

// T: of the query.
template <typename T>
__device__ __forceinline__ void store_gradient(const MaskGradient& gradient, int64_t at, float value) {
  if (gradient.kind == MaskKind::kFloat32) {
    static_cast<float*>(gradient.data)[at] = value;
  } else {
    static_cast<T*>(gradient.data)[at] = device::from_float<T>(value);
  }
}

}  // namespace fastgen::attention
