// Storage types, and functions for host and device.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTGEN_HOST_DEVICE __host__ __device__ __forceinline__
#define FASTGEN_UNROLL _Pragma("unroll")
#else
#define FASTGEN_HOST_DEVICE inline __attribute__((always_inline))
#define FASTGEN_UNROLL _Pragma("GCC unroll 16")
#endif

namespace fastgen {

enum class DType { kFloat32, kFloat16, kBFloat16 };

// Half-precision storage types; arithmetic is in float32.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

FASTGEN_HOST_DEVICE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

FASTGEN_HOST_DEVICE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

FASTGEN_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastgen
