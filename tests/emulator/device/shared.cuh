// Host twin of csrc/device/shared.cuh.
#pragma once

#include "device/language.h"

namespace fastgen::device {

constexpr int kSharedAlignment = 1024;

template <typename T>
inline constexpr char kSharedKey = 0;

__forceinline__ unsigned char* dynamic_shared() { return static_cast<unsigned char*>(emulator::dynamic_shared()); }

template <typename T>
__forceinline__ T& shared_variable(FASTGEN_WHERE) {
  return *static_cast<T*>(emulator::shared_variable(&kSharedKey<T>, __PRETTY_FUNCTION__, sizeof(T), alignof(T), where));
}

}  // namespace fastgen::device
