// Converts CUDA errors to exceptions that name the call.
#pragma once

#include <cuda_runtime_api.h>

#include "common/error.h"

namespace fastgen {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw Error(what, cudaGetErrorString(status));
}

}  // namespace fastgen
