// What values an array holds, for results of PyTorch's kernels: one pass, at the cost of a call by ctypes.
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

#include "common/cpu/levels.h"
#include "common/exported.h"
#include "common/types.h"

namespace fastgen::cpu {
namespace {

constexpr int kZero = 1, kNan = 2, kNotFinite = 4, kLarge = 8;
constexpr int64_t kFew = 1 << 16;  // elements, for which other threads are not worth their start

// kInfinity: the bits of infinity. Without their sign, those of finite numbers are smaller and those of NaN larger.
// kLargest: those of the smallest number that counts as large.
template <typename Bits, Bits kInfinity, Bits kLargest>
FASTGEN_HOST_DEVICE int scan_part(const Bits* bits, int64_t count) {
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;
  Bits smallest = kMagnitude, largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Bits magnitude = bits[i] & kMagnitude;
    smallest = magnitude < smallest ? magnitude : smallest;
    largest = magnitude > largest ? magnitude : largest;
  }
  return (count > 0 && smallest == 0 ? kZero : 0) | (largest > kInfinity ? kNan : 0) |
         (largest >= kInfinity ? kNotFinite : 0) | (largest >= kLargest ? kLarge : 0);
}

template <typename Bits, Bits kInfinity, Bits kLargest>
int scan(const void* data, int64_t count) {
  const Bits* bits = static_cast<const Bits*>(data);
  const auto part = for_level<scan_part<Bits, kInfinity, kLargest>>();
  if (count <= kFew) return part(bits, count);
  std::atomic<int> found(0);
  torch::stable::parallel_for(0, count, kFew,
                              [&](int64_t begin, int64_t end) { found |= part(bits + begin, end - begin); });
  return found;
}

}  // namespace
}  // namespace fastgen::cpu

// The sum of 1: some element is 0, 2: NaN, 4: infinite or NaN, 8: large, infinite or NaN. Large: products of two such
// numbers, added up, may overflow; from 2^60 on (2^500 in float64). No number of float16 is: its products are float32.
FASTGEN_EXPORTED int fastgen_scan_float32(const void* data, int64_t count) {
  return fastgen::cpu::scan<uint32_t, 0x7f800000u, 0x5d800000u>(data, count);
}
FASTGEN_EXPORTED int fastgen_scan_float64(const void* data, int64_t count) {
  return fastgen::cpu::scan<uint64_t, 0x7ff0000000000000u, 0x5f30000000000000u>(data, count);
}
FASTGEN_EXPORTED int fastgen_scan_bfloat16(const void* data, int64_t count) {
  return fastgen::cpu::scan<uint16_t, 0x7f80u, 0x5d80u>(data, count);
}
FASTGEN_EXPORTED int fastgen_scan_float16(const void* data, int64_t count) {
  return fastgen::cpu::scan<uint16_t, 0x7c00u, 0x7c00u>(data, count);
}
