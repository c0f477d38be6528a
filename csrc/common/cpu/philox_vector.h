// Philox of consecutive groups in registers, with the 32 x 32 -> 64 bit vector product of AVX2 and AVX-512.
//
// The state is in the low halves of 64-bit lanes. The product reads low halves only, so the high halves may hold any
// value until the end, and a round takes 2 products, 2 shifts and 4 exclusive ors. Two vectors are interleaved, since
// each round waits for the one before.
#pragma once

#include "common/cpu/levels.h"
#include "common/philox.h"

#if FASTGEN_X86_LEVELS
#include <immintrin.h>

namespace fastgen::cpu {

struct PhiloxAvx2 {
  static constexpr int kLanes = 8;
  __m256i keys[kPhiloxRounds][2], stream;

  FASTGEN_TARGET_AVX2 PhiloxAvx2(uint64_t seed, uint32_t stream_number) : stream(_mm256_set1_epi64x(stream_number)) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      keys[round][0] = _mm256_set1_epi64x(key0), keys[round][1] = _mm256_set1_epi64x(key1);
      key0 += kPhiloxIncrement0, key1 += kPhiloxIncrement1;
    }
  }

  // x[i]: component i of groups first to first + 7.
  FASTGEN_TARGET_AVX2 inline void operator()(uint64_t first, __m256i (&x)[kGroup]) const {
    const __m256i multiplier0 = _mm256_set1_epi64x(kPhiloxMultiplier0);
    const __m256i multiplier1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
    const __m256i index = _mm256_set1_epi64x(static_cast<int64_t>(first));
    // In this order a shuffle within 128-bit lanes joins the halves.
    const __m256i lanes[2] = {_mm256_set_epi64x(5, 4, 1, 0), _mm256_set_epi64x(7, 6, 3, 2)};
    __m256i c0[2], c1[2], c2[2], c3[2];
    for (int half = 0; half < 2; ++half) {
      c0[half] = _mm256_add_epi64(index, lanes[half]);
      c1[half] = _mm256_srli_epi64(c0[half], 32), c2[half] = stream, c3[half] = _mm256_setzero_si256();
    }
    FASTGEN_UNROLL
    for (int round = 0; round < kPhiloxRounds; ++round) {
      FASTGEN_UNROLL
      for (int half = 0; half < 2; ++half) {
        const __m256i product0 = _mm256_mul_epu32(c0[half], multiplier0);
        const __m256i product1 = _mm256_mul_epu32(c2[half], multiplier1);
        c0[half] = _mm256_xor_si256(_mm256_srli_epi64(product1, 32), _mm256_xor_si256(c1[half], keys[round][0]));
        c2[half] = _mm256_xor_si256(_mm256_srli_epi64(product0, 32), _mm256_xor_si256(c3[half], keys[round][1]));
        c1[half] = product1, c3[half] = product0;
      }
    }
    x[0] = low_halves(c0[0], c0[1]), x[1] = low_halves(c1[0], c1[1]);
    x[2] = low_halves(c2[0], c2[1]), x[3] = low_halves(c3[0], c3[1]);
  }

 private:
  FASTGEN_TARGET_AVX2 static inline __m256i low_halves(__m256i a, __m256i b) {
    return _mm256_castps_si256(
        _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), _MM_SHUFFLE(2, 0, 2, 0)));
  }
};

struct PhiloxAvx512 {
  static constexpr int kLanes = 16;
  __m512i keys[kPhiloxRounds][2], stream;

  FASTGEN_TARGET_AVX512 PhiloxAvx512(uint64_t seed, uint32_t stream_number) : stream(_mm512_set1_epi64(stream_number)) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      keys[round][0] = _mm512_set1_epi64(key0), keys[round][1] = _mm512_set1_epi64(key1);
      key0 += kPhiloxIncrement0, key1 += kPhiloxIncrement1;
    }
  }

  // x[i]: component i of groups first to first + 15.
  FASTGEN_TARGET_AVX512 inline void operator()(uint64_t first, __m512i (&x)[kGroup]) const {
    const __m512i multiplier0 = _mm512_set1_epi64(kPhiloxMultiplier0);
    const __m512i multiplier1 = _mm512_set1_epi64(kPhiloxMultiplier1);
    const __m512i index = _mm512_set1_epi64(static_cast<int64_t>(first));
    const __m512i lanes[2] = {_mm512_set_epi64(13, 12, 9, 8, 5, 4, 1, 0), _mm512_set_epi64(15, 14, 11, 10, 7, 6, 3, 2)};
    __m512i c0[2], c1[2], c2[2], c3[2];
    for (int half = 0; half < 2; ++half) {
      c0[half] = _mm512_add_epi64(index, lanes[half]);
      c1[half] = _mm512_srli_epi64(c0[half], 32), c2[half] = stream, c3[half] = _mm512_setzero_si512();
    }
    FASTGEN_UNROLL
    for (int round = 0; round < kPhiloxRounds; ++round) {
      FASTGEN_UNROLL
      for (int half = 0; half < 2; ++half) {
        const __m512i product0 = _mm512_mul_epu32(c0[half], multiplier0);
        const __m512i product1 = _mm512_mul_epu32(c2[half], multiplier1);
        c0[half] = exclusive_or(high_half(product1), c1[half], keys[round][0]);
        c2[half] = exclusive_or(high_half(product0), c3[half], keys[round][1]);
        c1[half] = product1, c3[half] = product0;
      }
    }
    x[0] = low_halves(c0[0], c0[1]), x[1] = low_halves(c1[0], c1[1]);
    x[2] = low_halves(c2[0], c2[1]), x[3] = low_halves(c3[0], c3[1]);
  }

 private:
  // The high 32 bits of each lane, in its low half. A shuffle, because products and shifts share a port.
  FASTGEN_TARGET_AVX512 static inline __m512i high_half(__m512i product) {
    return _mm512_shuffle_epi32(product, static_cast<_MM_PERM_ENUM>(0xF5));
  }
  FASTGEN_TARGET_AVX512 static inline __m512i exclusive_or(__m512i a, __m512i b, __m512i c) {
    return _mm512_ternarylogic_epi64(a, b, c, 0x96);
  }
  FASTGEN_TARGET_AVX512 static inline __m512i low_halves(__m512i a, __m512i b) {
    return _mm512_castps_si512(
        _mm512_shuffle_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), _MM_SHUFFLE(2, 0, 2, 0)));
  }
};

}  // namespace fastgen::cpu

#endif
