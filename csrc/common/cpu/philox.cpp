// Philox bits for consecutive groups.
#include "common/cpu/philox.h"

#include <cstring>

#include "common/cpu/levels.h"
#include "common/cpu/philox_vector.h"
#include "common/philox.h"

namespace fastgen::cpu {
namespace {

void philox_scalar(uint64_t seed, uint64_t first, int64_t groups, uint32_t stream, uint32_t* const* bits) {
  for (int64_t g = 0; g < groups; ++g) {
    const Philox4 group = philox(seed, first + static_cast<uint64_t>(g), stream);
    for (int i = 0; i < kGroup; ++i) bits[i][g] = group.x[i];
  }
}

#if FASTGEN_X86_LEVELS

template <typename Vector>
FASTGEN_HOST_DEVICE void store(const Vector (&x)[kGroup], int64_t g, uint32_t* const* bits) {
  for (int i = 0; i < kGroup; ++i) memcpy(bits[i] + g, &x[i], sizeof(Vector));
}

FASTGEN_TARGET_AVX2 void philox_avx2(uint64_t seed, uint64_t first, int64_t groups, uint32_t stream,
                                     uint32_t* const* bits) {
  if (const int64_t alike = alike_groups(first, groups); alike < groups) {
    uint32_t* const rest[] = {bits[0] + alike, bits[1] + alike, bits[2] + alike, bits[3] + alike};
    philox_avx2(seed, first + static_cast<uint64_t>(alike), groups - alike, stream, rest);
    groups = alike;
  }
  const PhiloxAvx2 philox(seed, stream, static_cast<uint32_t>(first >> 32));
  int64_t g = 0;
  for (; g + philox.kLanes <= groups; g += philox.kLanes) {
    __m256i x[kGroup];
    philox.generate<false>(static_cast<uint32_t>(first) + static_cast<uint32_t>(g), x);
    store(x, g, bits);
  }
  uint32_t* const rest[] = {bits[0] + g, bits[1] + g, bits[2] + g, bits[3] + g};
  philox_scalar(seed, first + static_cast<uint64_t>(g), groups - g, stream, rest);
}

FASTGEN_TARGET_AVX512 void philox_avx512(uint64_t seed, uint64_t first, int64_t groups, uint32_t stream,
                                         uint32_t* const* bits) {
  if (const int64_t alike = alike_groups(first, groups); alike < groups) {
    uint32_t* const rest[] = {bits[0] + alike, bits[1] + alike, bits[2] + alike, bits[3] + alike};
    philox_avx512(seed, first + static_cast<uint64_t>(alike), groups - alike, stream, rest);
    groups = alike;
  }
  const PhiloxAvx512 philox(seed, stream, static_cast<uint32_t>(first >> 32));
  int64_t g = 0;
  for (; g + philox.kLanes <= groups; g += philox.kLanes) {
    __m512i x[kGroup];
    philox.generate(static_cast<uint32_t>(first) + static_cast<uint32_t>(g), x);
    store(x, g, bits);
  }
  uint32_t* const rest[] = {bits[0] + g, bits[1] + g, bits[2] + g, bits[3] + g};
  philox_scalar(seed, first + static_cast<uint64_t>(g), groups - g, stream, rest);
}

#endif

}  // namespace

void philox_bits(uint64_t seed, uint64_t first, int64_t groups, uint32_t stream, uint32_t* const* bits) {
#if FASTGEN_X86_LEVELS
  pick(philox_scalar, philox_avx2, philox_avx512)(seed, first, groups, stream, bits);
#else
  philox_scalar(seed, first, groups, stream, bits);
#endif
}

}  // namespace fastgen::cpu
