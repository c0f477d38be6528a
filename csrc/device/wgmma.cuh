// Matrix products of a warpgroup, four warps of which the first is a multiple of four: wgmma. sm_90a.
//
// A product is asynchronous. From its start until a wait covers it, its accumulators and its left operand in registers
// must not be accessed, and its tiles in shared memory must not be written:
//
//   wgmma_fence(d, a)       registers written before reach the products after it; not needed between products
//                           that add to the same accumulators
//   wgmma(d, a, b)          starts d += a b
//   wgmma_commit()          closes the group of the products started since the last
//   wgmma_wait<n>(d, a)     waits for all but the newest n groups; d and a: registers of those that are complete
//
// Shared memory is read by the asynchronous proxy: what threads have written needs fence_async_proxy (fence.cuh), what
// tensor_load has copied does not. All threads of the warpgroup must execute the same calls with the same tiles.
//
// Fragments: warp w of the warpgroup has rows 16 w ... 16 w + 15 of d and a, as in mma.cuh; d[i] are columns
// 8 i ... 8 i + 7. PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
#pragma once

#include <type_traits>

#include "common/types.h"
#include "device/shared.cuh"

namespace fastgen::device {

constexpr int kWarpgroupSize = 128;
constexpr int kWgmmaRows = 64, kWgmmaDepth = 16;
constexpr int kPanelColumns = 64;          // of 16 bits: 128 bytes
constexpr int kSwizzleRepeatBytes = 1024;  // eight rows of 128 bytes

// How the 128-byte rows of a tile lie in an operand.
enum class Rows {
  kOuter,  // a row is one row of a, or one column of b, of 64 steps of the depth: "K-major"
  kDepth,  // a row is one step of the depth, of 64 rows of a or columns of b: "MN-major"
};

// An operand in shared memory, with the 128-byte swizzle (tensor_copy.cuh). PTX ISA, "Matrix Descriptor Format".
template <Rows kRows>
struct MatrixTile {
  uint64_t descriptor;

  // The same tile ``bytes`` further, a multiple of 16. In a tile with Rows::kOuter the next 16 steps of the depth are
  // 32 bytes further, with Rows::kDepth 2048.
  __device__ __forceinline__ MatrixTile<kRows> from(int bytes) const {
    return {descriptor + static_cast<uint64_t>(static_cast<uint32_t>(bytes) >> 4)};
  }
};

// ``tile``: a multiple of 1024 bytes. ``panel_bytes``: distance of the panels of 64 columns, of Rows::kDepth, a
// multiple of 1024.
template <Rows kRows>
__device__ __forceinline__ MatrixTile<kRows> matrix_tile(const void* tile, int panel_bytes = kSwizzleRepeatBytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kStride = uint64_t{kSwizzleRepeatBytes >> 4} << 32;
  const uint64_t start = (shared_address(tile) & 0x3ffffu) >> 4;
  const uint64_t leading = static_cast<uint64_t>(kRows == Rows::kDepth ? panel_bytes >> 4 : 1) << 16;
  return {start | leading | kStride | kSwizzle128};
}

// Keeps the compiler from moving accesses of registers over this point.
template <int kTiles>
__device__ __forceinline__ void hold_registers(float (&registers)[kTiles][4]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(registers[tile][i])::"memory");
  }
}
template <int kParts, int kFragments, int kTiles>
__device__ __forceinline__ void hold_registers(float (&registers)[kParts][kFragments][kTiles][4]) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int fragment = 0; fragment < kFragments; ++fragment) hold_registers(registers[part][fragment]);
  }
}
template <int kTiles>
__device__ __forceinline__ void hold_registers(uint32_t (&registers)[kTiles][4]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(registers[tile][i])::"memory");
  }
}

// A scheduling hint without semantics: what computes ``value``, which must not be negative, stays before the following
// wait. ptxas moves waits up past arithmetic, which would then not run beside the products.
__device__ __forceinline__ void compute_before_wait(float value) {
  asm volatile("{ .reg .pred p; setp.lt.f32 p, %0, 0f00000000; @p nanosleep.u32 0; }" ::"f"(value) : "memory");
}

// PTX ISA, "wgmma.fence". ``registers``: of the following products.
template <typename... Registers>
__device__ __forceinline__ void wgmma_fence(Registers&... registers) {
  (hold_registers(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// A hint without semantics: wgmma.fence where the registers of the following products were not written since the last
// one. ptxas wants it where they were read, after a wait, and otherwise inserts it with a warning (C7519).
template <typename... Registers>
__device__ __forceinline__ void fence_after_wait(Registers&... registers) {
  wgmma_fence(registers...);
}

// PTX ISA, "wgmma.commit_group".
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// PTX ISA, "wgmma.wait_group". ``registers``: of the groups that are complete then.
template <int kGroups, typename... Registers>
__device__ __forceinline__ void wgmma_wait(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
  (hold_registers(registers), ...);
}

// The operands of the instructions below: accumulators, in groups of eight columns.
#define FASTGEN_D(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define FASTGEN_D2(i) FASTGEN_D(i), FASTGEN_D(i + 1)
#define FASTGEN_D8(i)                                                                                     \
  FASTGEN_D(i), FASTGEN_D(i + 1), FASTGEN_D(i + 2), FASTGEN_D(i + 3), FASTGEN_D(i + 4), FASTGEN_D(i + 5), \
      FASTGEN_D(i + 6), FASTGEN_D(i + 7)
#define FASTGEN_REGISTERS_64                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTGEN_REGISTERS_80                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39"
#define FASTGEN_REGISTERS_96                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTGEN_REGISTERS_128                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTGEN_REGISTERS_160                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
// Numbers of the operands after the accumulators of the columns: left and right operand, whether to add,
// transpositions.
#define FASTGEN_WGMMA_SHARED(type, columns, a_, b_, add_, transposed_, ...)                                   \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #add_ ", 0; wgmma.mma_async.sync.aligned.m64n" #columns     \
               "k16.f32." type "." type " {" FASTGEN_REGISTERS_##columns "}, %" #a_ ", %" #b_                 \
                                                                         ", p, 1, 1, 0, %" #transposed_ "; }" \
               : __VA_ARGS__                                                                                  \
               : "l"(a.descriptor), "l"(b.descriptor), "r"(static_cast<int>(add)), "n"(kTransposed))
#define FASTGEN_WGMMA_REGISTERS(type, columns, a0_, a1_, a2_, a3_, b_, add_, transposed_, ...)                         \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #add_ ", 0; wgmma.mma_async.sync.aligned.m64n" #columns              \
               "k16.f32." type "." type " {" FASTGEN_REGISTERS_##columns "}, {%" #a0_ ", %" #a1_ ", %" #a2_ ", %" #a3_ \
                                                                         "}, %" #b_ ", p, 1, 1, %" #transposed_ "; }"  \
               : __VA_ARGS__                                                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor), "r"(static_cast<int>(add)),            \
                 "n"(kTransposed))
// Of 64, 80, 96, 128 or 160 columns.
#define FASTGEN_WGMMA_SHARED_OF(type)                                                                              \
  if constexpr (kTiles == 8) {                                                                                     \
    FASTGEN_WGMMA_SHARED(type, 64, 32, 33, 34, 35, FASTGEN_D8(0));                                                 \
  } else if constexpr (kTiles == 10) {                                                                             \
    FASTGEN_WGMMA_SHARED(type, 80, 40, 41, 42, 43, FASTGEN_D8(0), FASTGEN_D2(8));                                  \
  } else if constexpr (kTiles == 12) {                                                                             \
    FASTGEN_WGMMA_SHARED(type, 96, 48, 49, 50, 51, FASTGEN_D8(0), FASTGEN_D2(8), FASTGEN_D2(10));                  \
  } else if constexpr (kTiles == 20) {                                                                             \
    FASTGEN_WGMMA_SHARED(type, 160, 80, 81, 82, 83, FASTGEN_D8(0), FASTGEN_D8(8), FASTGEN_D2(16), FASTGEN_D2(18)); \
  } else {                                                                                                         \
    FASTGEN_WGMMA_SHARED(type, 128, 64, 65, 66, 67, FASTGEN_D8(0), FASTGEN_D8(8));                                 \
  }
#define FASTGEN_WGMMA_REGISTERS_OF(type)                                                          \
  if constexpr (kTiles == 8) {                                                                    \
    FASTGEN_WGMMA_REGISTERS(type, 64, 32, 33, 34, 35, 36, 37, 38, FASTGEN_D8(0));                 \
  } else {                                                                                        \
    FASTGEN_WGMMA_REGISTERS(type, 128, 64, 65, 66, 67, 68, 69, 70, FASTGEN_D8(0), FASTGEN_D8(8)); \
  }

// d += a b, or d = a b without ``add``: 64 rows, 8 kTiles columns, depth 16; summed in float32. T: Half or BFloat16.
// The left operand is a tile or in registers. PTX ISA, "wgmma.mma_async" (.m64nNk16).
template <typename T, int kTiles, Rows kRows>
__device__ __forceinline__ void wgmma(float (&d)[kTiles][4], const MatrixTile<Rows::kOuter>& a,
                                      const MatrixTile<kRows>& b, bool add = true) {
  static_assert(kTiles == 8 || kTiles == 10 || kTiles == 12 || kTiles == 16 || kTiles == 20,
                "64, 80, 96, 128 or 160 columns");
  static_assert(kRows == Rows::kOuter || kTiles % 8 == 0, "columns of whole panels");
  constexpr int kTransposed = kRows == Rows::kDepth ? 1 : 0;
  if constexpr (std::is_same_v<T, Half>) {
    FASTGEN_WGMMA_SHARED_OF("f16")
  } else {
    static_assert(std::is_same_v<T, BFloat16>, "16-bit elements");
    FASTGEN_WGMMA_SHARED_OF("bf16")
  }
}
template <typename T, int kTiles, Rows kRows>
__device__ __forceinline__ void wgmma(float (&d)[kTiles][4], const uint32_t (&a)[4], const MatrixTile<kRows>& b,
                                      bool add = true) {
  static_assert(kTiles == 8 || kTiles == 16, "64 or 128 columns");
  constexpr int kTransposed = kRows == Rows::kDepth ? 1 : 0;
  if constexpr (std::is_same_v<T, Half>) {
    FASTGEN_WGMMA_REGISTERS_OF("f16")
  } else {
    static_assert(std::is_same_v<T, BFloat16>, "16-bit elements");
    FASTGEN_WGMMA_REGISTERS_OF("bf16")
  }
}

#undef FASTGEN_D
#undef FASTGEN_D2
#undef FASTGEN_D8
#undef FASTGEN_REGISTERS_64
#undef FASTGEN_REGISTERS_80
#undef FASTGEN_REGISTERS_96
#undef FASTGEN_REGISTERS_128
#undef FASTGEN_REGISTERS_160
#undef FASTGEN_WGMMA_SHARED
#undef FASTGEN_WGMMA_REGISTERS
#undef FASTGEN_WGMMA_SHARED_OF
#undef FASTGEN_WGMMA_REGISTERS_OF

}  // namespace fastgen::device
