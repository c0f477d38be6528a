// Host twin of csrc/device/tensor_copy.cuh.
#pragma once

#include "common/error.h"
#include "common/types.h"
#include "device/mbarrier.cuh"

namespace fastgen::device {

constexpr int kTensorDims = 4;
constexpr int kSwizzleBytes = 128;
constexpr int kTensorAlignment = 16;

struct TensorLayout {
  const void* data = nullptr;
  uint64_t sizes[kTensorDims] = {1, 1, 1, 1};
  uint64_t strides[kTensorDims - 1] = {};
  uint32_t box[kTensorDims] = {1, 1, 1, 1};
};

struct TensorMap {
  emulator::TensorMap map;
};

// What cuTensorMapEncodeTiled refuses.
template <typename T>
TensorMap tensor_map(const TensorLayout& layout) {
  static_assert(sizeof(T) == 2, "elements have 16 bits");
  constexpr uint64_t kMostSize = uint64_t{1} << 32, kMostStride = uint64_t{1} << 40;
  constexpr uint32_t kMostBox = 256;
  bool fits = reinterpret_cast<uintptr_t>(layout.data) % kTensorAlignment == 0;
  fits = fits && layout.box[0] * sizeof(T) == kSwizzleBytes;
  for (const uint64_t size : layout.sizes) fits = fits && size > 0 && size <= kMostSize;
  for (const uint32_t size : layout.box) fits = fits && size > 0 && size <= kMostBox;
  for (const uint64_t stride : layout.strides) {
    fits = fits && stride > 0 && stride % kTensorAlignment == 0 && stride < kMostStride;
  }
  if (!fits) throw Error("cuTensorMapEncodeTiled", "the tensor has no tensor map");
  TensorMap map;
  map.map.data = reinterpret_cast<uintptr_t>(layout.data);
  for (int i = 0; i < kTensorDims; ++i) map.map.sizes[i] = layout.sizes[i], map.map.box[i] = layout.box[i];
  for (int i = 0; i < kTensorDims - 1; ++i) map.map.strides[i] = layout.strides[i];
  return map;
}

__forceinline__ void tensor_load(void* target, const TensorMap& map, const int (&at)[kTensorDims], Mbarrier* barrier,
                                 FASTGEN_WHERE) {
  emulator::tensor_load(target, map.map, at, barrier, where);
}

__forceinline__ void tensor_store(const TensorMap& map, const int (&at)[kTensorDims], const void* source,
                                  FASTGEN_WHERE) {
  emulator::tensor_store(map.map, at, source, where);
}

__forceinline__ void tensor_store_commit(FASTGEN_WHERE) { emulator::tensor_store_commit(where); }

template <int kGroups>
__forceinline__ void tensor_store_wait_read(FASTGEN_WHERE) {
  emulator::tensor_store_wait(kGroups, false, where);
}

template <int kGroups>
__forceinline__ void tensor_store_wait(FASTGEN_WHERE) {
  emulator::tensor_store_wait(kGroups, true, where);
}

}  // namespace fastgen::device
