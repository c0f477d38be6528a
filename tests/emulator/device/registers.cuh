// Host twin of csrc/device/registers.cuh.
#pragma once

#include "device/language.h"

namespace fastgen::device {

template <int kCount>
__forceinline__ void increase_registers(FASTGEN_WHERE) {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0, "a multiple of 8 from 24 to 256");
  emulator::set_registers(kCount, true, where);
}
template <int kCount>
__forceinline__ void decrease_registers(FASTGEN_WHERE) {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0, "a multiple of 8 from 24 to 256");
  emulator::set_registers(kCount, false, where);
}

}  // namespace fastgen::device
