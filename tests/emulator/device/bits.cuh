// Host twin of csrc/device/bits.cuh.
#pragma once

#include <cstdint>

#include "device/language.h"

namespace fastgen::device {

__forceinline__ uint32_t shift_left(uint32_t word, uint32_t bits) { return bits < 32 ? word << bits : 0; }
__forceinline__ uint32_t shift_right(uint32_t word, uint32_t bits) { return bits < 32 ? word >> bits : 0; }
__forceinline__ uint32_t opaque(uint32_t word) { return word; }

}  // namespace fastgen::device
