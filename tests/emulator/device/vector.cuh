// Host twin of csrc/device/vector.cuh.
#pragma once

#include "device/convert.cuh"
#include "device/language.h"

namespace fastgen::device {

constexpr int kVectorBytes = 16;

template <typename T>
constexpr int kVectorElements = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
__forceinline__ void load_vector(const T* source, T (&elements)[kVectorElements<T>]) {
  emulator::load(elements, source, kVectorBytes);
}

template <typename T>
__forceinline__ void store_vector(T* target, const T (&elements)[kVectorElements<T>]) {
  emulator::store(target, elements, kVectorBytes);
}

__forceinline__ void load_words(const void* source, uint32_t (&words)[2]) {
  emulator::load(words, source, sizeof(words));
}

__forceinline__ void store_words(void* target, const uint32_t (&words)[2]) {
  emulator::store(target, words, sizeof(words));
}

}  // namespace fastgen::device
