// Philox bits for consecutive groups, vectorized with the 32 x 32 -> 64 bit vector product of AVX2 and AVX-512.
//
// The state is in the low halves of 64-bit lanes. The product reads low halves only, so the high halves may hold any
// value until the end, and a round takes 2 products, 2 shifts and 4 exclusive ors.
#include "common/cpu/philox.h"

#include "common/cpu/levels.h"
#include "common/philox.h"

#if FASTGEN_X86_LEVELS
#include <immintrin.h>
#endif

namespace fastgen::cpu {
namespace {

void philox_scalar(uint64_t seed, uint64_t first, int64_t groups, uint32_t stream, uint32_t* const* bits) {
  for (int64_t g = 0; g < groups; ++g) {
    const Philox4 group = philox(seed, first + static_cast<uint64_t>(g), stream);
    for (int i = 0; i < kGroup; ++i) bits[i][g] = group.x[i];
  }
}

#if FASTGEN_X86_LEVELS

// The high 32 bits of each 64-bit lane, in the low half. A shuffle, because products and shifts share a port.
FASTGEN_TARGET_AVX512 inline __m512i high_half(__m512i product) {
  return _mm512_shuffle_epi32(product, static_cast<_MM_PERM_ENUM>(0xF5));
}

FASTGEN_TARGET_AVX512 void philox_avx512(uint64_t seed, uint64_t first, int64_t groups, uint32_t stream,
                                         uint32_t* const* bits) {
  constexpr int kLanes = 8;
  const __m512i multiplier0 = _mm512_set1_epi64(kPhiloxMultiplier0);
  const __m512i multiplier1 = _mm512_set1_epi64(kPhiloxMultiplier1);
  const __m512i lanes = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  int64_t g = 0;
  for (; g + kLanes <= groups; g += kLanes) {
    const __m512i index = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first) + g), lanes);
    __m512i c0 = index, c1 = _mm512_srli_epi64(index, 32), c2 = _mm512_set1_epi64(stream), c3 = _mm512_setzero_si512();
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const __m512i product0 = _mm512_mul_epu32(c0, multiplier0), product1 = _mm512_mul_epu32(c2, multiplier1);
      c0 = _mm512_xor_si512(_mm512_xor_si512(high_half(product1), c1), _mm512_set1_epi64(key0));
      c2 = _mm512_xor_si512(_mm512_xor_si512(high_half(product0), c3), _mm512_set1_epi64(key1));
      c1 = product1, c3 = product0;
      key0 += kPhiloxIncrement0, key1 += kPhiloxIncrement1;
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bits[0] + g), _mm512_cvtepi64_epi32(c0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bits[1] + g), _mm512_cvtepi64_epi32(c1));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bits[2] + g), _mm512_cvtepi64_epi32(c2));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bits[3] + g), _mm512_cvtepi64_epi32(c3));
  }
  uint32_t* const rest[] = {bits[0] + g, bits[1] + g, bits[2] + g, bits[3] + g};
  philox_scalar(seed, first + static_cast<uint64_t>(g), groups - g, stream, rest);
}

FASTGEN_TARGET_AVX2 inline void store_low_halves(__m256i even, __m256i odd, uint32_t* target) {
  // even: lanes 0..3, odd: lanes 4..7, each in the low half of 64 bits.
  const __m256i packed = _mm256_castps_si256(
      _mm256_shuffle_ps(_mm256_castsi256_ps(even), _mm256_castsi256_ps(odd), _MM_SHUFFLE(2, 0, 2, 0)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0)));
}

FASTGEN_TARGET_AVX2 void philox_avx2(uint64_t seed, uint64_t first, int64_t groups, uint32_t stream,
                                     uint32_t* const* bits) {
  constexpr int kLanes = 8;  // two vectors of four
  const __m256i multiplier0 = _mm256_set1_epi64x(kPhiloxMultiplier0);
  const __m256i multiplier1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
  const __m256i lanes = _mm256_set_epi64x(3, 2, 1, 0);
  int64_t g = 0;
  for (; g + kLanes <= groups; g += kLanes) {
    __m256i c0[2], c1[2], c2[2], c3[2];
    for (int half = 0; half < 2; ++half) {
      c0[half] = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first) + g + 4 * half), lanes);
      c1[half] = _mm256_srli_epi64(c0[half], 32);
      c2[half] = _mm256_set1_epi64x(stream), c3[half] = _mm256_setzero_si256();
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int half = 0; half < 2; ++half) {
        const __m256i product0 = _mm256_mul_epu32(c0[half], multiplier0);
        const __m256i product1 = _mm256_mul_epu32(c2[half], multiplier1);
        c0[half] =
            _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), c1[half]), _mm256_set1_epi64x(key0));
        c2[half] =
            _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), c3[half]), _mm256_set1_epi64x(key1));
        c1[half] = product1, c3[half] = product0;
      }
      key0 += kPhiloxIncrement0, key1 += kPhiloxIncrement1;
    }
    store_low_halves(c0[0], c0[1], bits[0] + g);
    store_low_halves(c1[0], c1[1], bits[1] + g);
    store_low_halves(c2[0], c2[1], bits[2] + g);
    store_low_halves(c3[0], c3[1], bits[3] + g);
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
