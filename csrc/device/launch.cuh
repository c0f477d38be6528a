// Kernel launches: on the given stream, checked, without synchronization.
#pragma once

#include <cuda_runtime.h>

#include "common/check.h"

namespace fastgen::device {

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
};

template <typename... Args>
void launch(const char* name, void (*kernel)(Args...), const Launch& config, Args... args) {
  // Larger sizes require the opt-in attribute, which fails if the device does not support them.
  constexpr size_t kSharedBytesForAll = 48 * 1024;
  if (config.shared_bytes > kSharedBytesForAll) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(config.shared_bytes)),
               name);
  }
  void* pointers[] = {&args...};
  check_cuda(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), config.grid, config.block, pointers,
                              config.shared_bytes, config.stream),
             name);
}

// Streaming multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

}  // namespace fastgen::device
