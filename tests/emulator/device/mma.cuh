// Host twin of csrc/device/mma.cuh.
#pragma once

#include "common/types.h"
#include "device/shared.cuh"

namespace fastgen::device {

template <int kMatrices>
__forceinline__ void ldmatrix(uint32_t (&registers)[kMatrices], const void* row, FASTGEN_WHERE) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "ldmatrix loads 1, 2 or 4 matrices");
  emulator::load_matrices(registers, row, kMatrices, false, where);
}
template <int kMatrices>
__forceinline__ void ldmatrix_trans(uint32_t (&registers)[kMatrices], const void* row, FASTGEN_WHERE) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "ldmatrix loads 1, 2 or 4 matrices");
  emulator::load_matrices(registers, row, kMatrices, true, where);
}
template <int kMatrices>
__forceinline__ void stmatrix(void* row, const uint32_t (&registers)[kMatrices], FASTGEN_WHERE) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "stmatrix stores 1, 2 or 4 matrices");
  emulator::store_matrices(row, registers, kMatrices, false, where);
}
template <int kMatrices>
__forceinline__ void stmatrix_trans(void* row, const uint32_t (&registers)[kMatrices], FASTGEN_WHERE) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "stmatrix stores 1, 2 or 4 matrices");
  emulator::store_matrices(row, registers, kMatrices, true, where);
}

template <typename T>
constexpr emulator::Element kElement = [] {
  static_assert(sizeof(T) == 0, "mma_m16n8k16: no such element type");
  return emulator::Element::kFloat16;
}();
template <>
inline constexpr emulator::Element kElement<Half> = emulator::Element::kFloat16;
template <>
inline constexpr emulator::Element kElement<BFloat16> = emulator::Element::kBFloat16;

template <typename T>
__forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FASTGEN_WHERE) {
  emulator::multiply(kElement<T>, d, a, b, where);
}
__forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FASTGEN_WHERE) {
  emulator::multiply(emulator::Element::kTFloat32, d, a, b, where);
}

}  // namespace fastgen::device
