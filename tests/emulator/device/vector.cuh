// Host twin of csrc/device/vector.cuh. A misaligned access is an error, as on the device.
#pragma once

#include "cpu/convert.h"
#include "device/threads.h"

namespace fastgen::device {

using cpu::from_float;
using cpu::to_float;

constexpr int kVectorBytes = 16;

template <typename T>
constexpr int kVectorElements = kVectorBytes / static_cast<int>(sizeof(T));

inline void require_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % kVectorBytes != 0) std::terminate();
}

template <typename T>
void load_vector(const T* source, T (&elements)[kVectorElements<T>]) {
  require_aligned(source);
  memcpy(elements, source, kVectorBytes);
}

template <typename T>
void store_vector(T* target, const T (&elements)[kVectorElements<T>]) {
  require_aligned(target);
  memcpy(target, elements, kVectorBytes);
}

}  // namespace fastgen::device
