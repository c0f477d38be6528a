// Shared memory of a block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastgen::device {

constexpr int kSharedAlignment = 1024;  // of the widest swizzle pattern of sm_90

// The launch's dynamic shared memory. PTX ISA, "State Spaces": .shared.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(kSharedAlignment) unsigned char fastgen_dynamic_shared[];
  return fastgen_dynamic_shared;
}

// The block's static variable of type T, uninitialized: one per type.
template <typename T>
__device__ __forceinline__ T& shared_variable() {
  __shared__ T variable;
  return variable;
}

// The address in the shared window, as PTX instructions take it. PTX ISA, "cvta".
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace fastgen::device
