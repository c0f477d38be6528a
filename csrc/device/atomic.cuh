// Atomic read-modify-write in global or shared memory, relaxed: it does not order other accesses.
// PTX ISA, "atom". Each returns the old value.
#pragma once

#include <cuda_runtime.h>

namespace fastgen::device {

// T: float, int or unsigned.
template <typename T>
__device__ __forceinline__ T atomic_add(T* address, T value) {
  return atomicAdd(address, value);
}
// The following: T is int or unsigned.
template <typename T>
__device__ __forceinline__ T atomic_max(T* address, T value) {
  return atomicMax(address, value);
}
template <typename T>
__device__ __forceinline__ T atomic_min(T* address, T value) {
  return atomicMin(address, value);
}
template <typename T>
__device__ __forceinline__ T atomic_exchange(T* address, T value) {
  return atomicExch(address, value);
}
// Stores ``value`` if the memory holds ``expected``.
template <typename T>
__device__ __forceinline__ T atomic_compare_exchange(T* address, T expected, T value) {
  return atomicCAS(address, expected, value);
}

}  // namespace fastgen::device
