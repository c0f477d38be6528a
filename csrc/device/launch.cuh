// Kernel launches: on the given stream, checked, without synchronization.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"

namespace fastgen::device {

// Static shared memory of a kernel with dynamic shared memory is at most this, with the alignment of the latter.
constexpr size_t kStaticSharedBytes = 2048;

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
};

// A dimension of a grid, at most ``most``: 2147483647 in x, 65535 in y and z.
inline unsigned grid_size(int64_t blocks, const char* name, int64_t most = INT32_MAX) {
  if (blocks < 0 || blocks > most) throw Error(name, "more elements than one launch has blocks for");
  return static_cast<unsigned>(blocks);
}

template <typename... Args>
void launch(const char* name, void (*kernel)(Args...), const Launch& config, Args... args) {
  // Static and dynamic shared memory together; larger sizes require the opt-in attribute, which fails if the device
  // does not support them.
  constexpr size_t kSharedBytesForAll = 48 * 1024;
  if (config.shared_bytes + kStaticSharedBytes > kSharedBytesForAll) {
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

// Shared memory that a block of the current device may have, in bytes.
inline int shared_limit() {
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return bytes;
}

// The current device's compute capability, such as 90.
inline int architecture() {
  int device = 0, major = 0, minor = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  return 10 * major + minor;
}

}  // namespace fastgen::device
