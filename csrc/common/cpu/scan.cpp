// What values an array holds, for small results of PyTorch's kernels: one pass, at the cost of a call by ctypes.
#include <cstdint>

#include "common/exported.h"

namespace {

constexpr int kZero = 1, kNan = 2, kNotFinite = 4;

// kInfinity: the bits of infinity. Without their sign, those of finite numbers are smaller and those of NaN larger.
template <typename Bits, Bits kInfinity>
int scan(const void* data, int64_t count) {
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;
  const Bits* bits = static_cast<const Bits*>(data);
  Bits smallest = kMagnitude, largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Bits magnitude = bits[i] & kMagnitude;
    smallest = magnitude < smallest ? magnitude : smallest;
    largest = magnitude > largest ? magnitude : largest;
  }
  return (count > 0 && smallest == 0 ? kZero : 0) | (largest > kInfinity ? kNan : 0) |
         (largest >= kInfinity ? kNotFinite : 0);
}

}  // namespace

// The sum of 1: some element is 0, 2: NaN, 4: infinite or NaN.
FASTGEN_EXPORTED int fastgen_scan_float32(const void* data, int64_t count) {
  return scan<uint32_t, 0x7f800000u>(data, count);
}
FASTGEN_EXPORTED int fastgen_scan_float64(const void* data, int64_t count) {
  return scan<uint64_t, 0x7ff0000000000000u>(data, count);
}
FASTGEN_EXPORTED int fastgen_scan_bfloat16(const void* data, int64_t count) {
  return scan<uint16_t, 0x7f80u>(data, count);
}
FASTGEN_EXPORTED int fastgen_scan_float16(const void* data, int64_t count) {
  return scan<uint16_t, 0x7c00u>(data, count);
}
