// Host twin of csrc/device/wgmma.cuh.
#pragma once

#include "device/mma.cuh"
#include "device/shared.cuh"

namespace fastgen::device {

constexpr int kWarpgroupSize = 128;
constexpr int kWgmmaRows = 64, kWgmmaDepth = 16;
constexpr int kPanelColumns = 64;
constexpr int kSwizzleRepeatBytes = 1024;

enum class Rows { kOuter, kDepth };

template <Rows kRows>
struct MatrixTile {
  uint64_t descriptor;

  __forceinline__ MatrixTile<kRows> from(int bytes) const {
    return {descriptor + static_cast<uint64_t>(static_cast<uint32_t>(bytes) >> 4)};
  }
};

template <Rows kRows>
__forceinline__ MatrixTile<kRows> matrix_tile(const void* tile, int panel_bytes = kSwizzleRepeatBytes, FASTGEN_WHERE) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kStride = uint64_t{kSwizzleRepeatBytes >> 4} << 32;
  const uint64_t leading = static_cast<uint64_t>(kRows == Rows::kDepth ? panel_bytes >> 4 : 1) << 16;
  return {emulator::tile_address(tile, where) | leading | kStride | kSwizzle128};
}

// Kernels are compiled so that accesses stay where they are written.
template <typename Registers>
__forceinline__ void hold_registers(Registers&) {}

__forceinline__ void compute_before_wait(float) {}

template <typename Registers>
__forceinline__ void fence_after_wait(Registers&) {}

// The location of the call cannot follow a pack of arguments.
template <typename Registers>
__forceinline__ void wgmma_fence(Registers&, FASTGEN_WHERE) {
  emulator::wgmma_fence(where);
}
template <typename First, typename Second>
__forceinline__ void wgmma_fence(First&, Second&, FASTGEN_WHERE) {
  emulator::wgmma_fence(where);
}
template <typename First, typename Second, typename Third>
__forceinline__ void wgmma_fence(First&, Second&, Third&, FASTGEN_WHERE) {
  emulator::wgmma_fence(where);
}

__forceinline__ void wgmma_commit(FASTGEN_WHERE) { emulator::wgmma_commit(where); }

template <int kGroups, typename Registers>
__forceinline__ void wgmma_wait(Registers&, FASTGEN_WHERE) {
  emulator::wgmma_wait(kGroups, where);
}
template <int kGroups, typename First, typename Second>
__forceinline__ void wgmma_wait(First&, Second&, FASTGEN_WHERE) {
  emulator::wgmma_wait(kGroups, where);
}
template <int kGroups, typename First, typename Second, typename Third>
__forceinline__ void wgmma_wait(First&, Second&, Third&, FASTGEN_WHERE) {
  emulator::wgmma_wait(kGroups, where);
}

template <typename T, int kTiles, Rows kRows>
__forceinline__ void wgmma(float (&d)[kTiles][4], const MatrixTile<Rows::kOuter>& a, const MatrixTile<kRows>& b,
                           bool add = true, FASTGEN_WHERE) {
  static_assert(kTiles == 8 || kTiles == 10 || kTiles == 12 || kTiles == 16 || kTiles == 20,
                "64, 80, 96, 128 or 160 columns");
  static_assert(kRows == Rows::kOuter || kTiles % 8 == 0, "columns of whole panels");
  emulator::wgmma({kElement<T>, kTiles, d[0], nullptr, a.descriptor, b.descriptor, kRows == Rows::kDepth, add}, where);
}
template <typename T, int kTiles, Rows kRows>
__forceinline__ void wgmma(float (&d)[kTiles][4], const uint32_t (&a)[4], const MatrixTile<kRows>& b, bool add = true,
                           FASTGEN_WHERE) {
  static_assert(kTiles == 8 || kTiles == 16, "64 or 128 columns");
  emulator::wgmma({kElement<T>, kTiles, d[0], a, 0, b.descriptor, kRows == Rows::kDepth, add}, where);
}

}  // namespace fastgen::device
