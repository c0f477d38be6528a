// Device memory on a GPU.
#pragma once

#include "common/check.h"

namespace fastgen {

class DeviceMemory {
 public:
  DeviceMemory(const void* source, size_t bytes, bool) : bytes_(bytes) {
    check_cuda(cudaMalloc(&memory_, bytes), "cudaMalloc");
    if (source != nullptr) check_cuda(cudaMemcpy(memory_, source, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  ~DeviceMemory() { cudaFree(memory_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  void* data() { return memory_; }
  // Waits for the kernels before it.
  void read(void* target) { check_cuda(cudaMemcpy(target, memory_, bytes_, cudaMemcpyDeviceToHost), "a kernel"); }

 private:
  size_t bytes_;
  void* memory_ = nullptr;
};

}  // namespace fastgen
