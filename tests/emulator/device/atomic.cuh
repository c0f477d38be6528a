// Host twin of csrc/device/atomic.cuh.
#pragma once

#include <algorithm>
#include <type_traits>

#include "device/language.h"

namespace fastgen::device {

// Update: (old, operand) -> new.
template <typename T, typename Operand, typename Update>
__forceinline__ T atomic_update(T* address, const Operand& operand, Update) {
  T old;
  emulator::atomic(address, sizeof(T), &operand, &old, [](void* memory, const void* given) {
    T value;
    Operand other;
    __builtin_memcpy(&value, memory, sizeof(T)), __builtin_memcpy(&other, given, sizeof(Operand));
    value = Update()(value, other);
    __builtin_memcpy(memory, &value, sizeof(T));
  });
  return old;
}

template <typename T>
__forceinline__ T atomic_add(T* address, T value) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, int> || std::is_same_v<T, unsigned>, "no such atom.add");
  return atomic_update(address, value, [](T old, T more) { return old + more; });
}
template <typename T>
__forceinline__ T atomic_max(T* address, T value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>, "no such atom.max");
  return atomic_update(address, value, [](T old, T other) { return std::max(old, other); });
}
template <typename T>
__forceinline__ T atomic_min(T* address, T value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>, "no such atom.min");
  return atomic_update(address, value, [](T old, T other) { return std::min(old, other); });
}
template <typename T>
__forceinline__ T atomic_exchange(T* address, T value) {
  return atomic_update(address, value, [](T, T other) { return other; });
}
template <typename T>
__forceinline__ T atomic_compare_exchange(T* address, T expected, T value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>, "no such atom.cas");
  struct Pair {
    T expected, value;
  };
  return atomic_update(address, Pair{expected, value},
                       [](T old, const Pair& pair) { return old == pair.expected ? pair.value : old; });
}

}  // namespace fastgen::device
