// Asynchronous copies of boxes of a tensor between global and shared memory, by the tensor memory accelerator of sm_90.
//
// In shared memory a box has rows of 128 bytes, the innermost dim, with the 128-byte swizzle: bits 4-6 of a byte's
// address are XORed with bits 7-9. wgmma.cuh reads such tiles.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/check.h"
#include "common/types.h"
#include "device/mbarrier.cuh"

namespace fastgen::device {

constexpr int kTensorDims = 4;
constexpr int kSwizzleBytes = 128;  // of a box's row
constexpr int kTensorAlignment = 16;

// A tensor of 16-bit elements: dims from the innermost one, whose elements are contiguous.
struct TensorLayout {
  const void* data = nullptr;
  uint64_t sizes[kTensorDims] = {1, 1, 1, 1};  // positive
  uint64_t strides[kTensorDims - 1] = {};      // bytes, of dims 1, 2 and 3: positive multiples of 16, below 2^40
  uint32_t box[kTensorDims] = {1, 1, 1, 1};    // up to 256; the innermost has 128 bytes
};

// What the tensor memory accelerator knows of a tensor. A kernel takes it as a parameter that is const and
// __grid_constant__: tensor_load and tensor_store read it from there.
struct TensorMap {
  CUtensorMap map;  // aligned to 64 bytes or more
};

// PTX ISA, "Tensor Map"; CUDA Driver API, cuTensorMapEncodeTiled, which is looked up at run time, so that nothing links
// against the driver. T: Half or BFloat16.
template <typename T>
TensorMap tensor_map(const TensorLayout& layout) {
  static_assert(sizeof(T) == 2, "elements have 16 bits");
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  constexpr const char* kName = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
  check_cuda(cudaGetDriverEntryPointByVersion(kName, &found, 12000, cudaEnableDefault, &result), kName);
#else
  check_cuda(cudaGetDriverEntryPoint(kName, &found, cudaEnableDefault, &result), kName);
#endif
  if (result != cudaDriverEntryPointSuccess) throw Error(kName, "the driver does not have it");
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  const cuuint64_t sizes[] = {layout.sizes[0], layout.sizes[1], layout.sizes[2], layout.sizes[3]};
  const cuuint64_t strides[] = {layout.strides[0], layout.strides[1], layout.strides[2]};
  const cuuint32_t box[] = {layout.box[0], layout.box[1], layout.box[2], layout.box[3]}, steps[] = {1, 1, 1, 1};
  constexpr bool kIsHalf = std::is_same_v<T, Half>;
  TensorMap map;
  const CUresult status =
      encode(&map.map, kIsHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kTensorDims,
             const_cast<void*>(layout.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw Error(kName, "the tensor has no tensor map");
  return map;
}

// Starts the copy of the box at ``at``, elements from the innermost dim on, to a multiple of 1024 bytes in shared
// memory; elements outside the tensor are zeros. It completes as many bytes of the mbarrier's phase as the box has,
// those included, and is visible to threads that wait for the phase. Called by one thread. sm_90. PTX ISA,
// "cp.async.bulk.tensor" (.mbarrier::complete_tx::bytes).
__device__ __forceinline__ void tensor_load(void* target, const TensorMap& map, const int (&at)[kTensorDims],
                                            Mbarrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(target)),
      "l"(reinterpret_cast<uint64_t>(&map.map)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
      "r"(shared_address(barrier))
      : "memory");
}

// Starts the copy of a tile in shared memory, laid out as tensor_load does, to the box at ``at``; elements outside the
// tensor are not written. It belongs to this thread's current group. Threads that wrote the tile need fence_async_proxy
// and a barrier before. The tile must not change until tensor_store_wait_read or tensor_store_wait; the block must not
// end before one of them. Called by one thread. sm_90. PTX ISA, "cp.async.bulk.tensor" (.bulk_group).
__device__ __forceinline__ void tensor_store(const TensorMap& map, const int (&at)[kTensorDims], const void* source) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(
                   reinterpret_cast<uint64_t>(&map.map)),
               "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(shared_address(source))
               : "memory");
}

// Closes the group of the stores that this thread has started since the last; it may be empty. Other groups than those
// of async_copy_commit. sm_90. PTX ISA, "cp.async.bulk.commit_group".
__device__ __forceinline__ void tensor_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until the tiles of all but the newest kGroups groups of this thread have been read; other threads need a
// barrier before they write them. sm_90. PTX ISA, "cp.async.bulk.wait_group" (.read).
template <int kGroups>
__device__ __forceinline__ void tensor_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}

// Waits until all but the newest kGroups groups of this thread are complete: what they wrote is visible to it. sm_90.
// PTX ISA, "cp.async.bulk.wait_group".
template <int kGroups>
__device__ __forceinline__ void tensor_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kGroups) : "memory");
}

}  // namespace fastgen::device
