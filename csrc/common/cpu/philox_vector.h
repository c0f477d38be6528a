// Philox of consecutive groups in registers, with the 32 x 32 -> 64 bit vector product of AVX2 and AVX-512.
//
// The state is in the low halves of 64-bit lanes. The product reads low halves only, so the high halves may hold any
// value until the end, and a round takes 2 products, 2 shifts and 4 exclusive ors. Two vectors are interleaved, since
// each round waits for the one before. With AVX2, 138 instructions make 32 numbers.
#pragma once

#include "common/cpu/levels.h"
#include "common/philox.h"

#if FASTGEN_X86_LEVELS
#include <immintrin.h>

namespace fastgen::cpu {

// What enters each round by exclusive or alike in all groups of a call, which have the same high half of the index,
// ``high``: the keys, and until the third round what the stream number and ``high`` have become.
struct PhiloxKeys {
  uint32_t of[kPhiloxRounds][2];

  FASTGEN_HOST_DEVICE PhiloxKeys(uint64_t seed, uint32_t stream, uint32_t high) {
    FASTGEN_UNROLL
    for (int round = 0; round < kPhiloxRounds; ++round) {
      of[round][0] = static_cast<uint32_t>(seed) + static_cast<uint32_t>(round) * kPhiloxIncrement0;
      of[round][1] = static_cast<uint32_t>(seed >> 32) + static_cast<uint32_t>(round) * kPhiloxIncrement1;
    }
    // Products of the stream number in the first round, and of what it makes of c0 in the second.
    const uint64_t first = uint64_t{kPhiloxMultiplier1} * stream;
    const uint64_t second = uint64_t{kPhiloxMultiplier0} * (static_cast<uint32_t>(first >> 32) ^ high ^ of[0][0]);
    of[1][0] ^= static_cast<uint32_t>(first);
    of[1][1] ^= static_cast<uint32_t>(second >> 32);
    of[2][1] ^= static_cast<uint32_t>(second);
  }
};

// How many of ``groups`` groups from ``first`` on have the high half of the first.
inline int64_t alike_groups(uint64_t first, int64_t groups) {
  const int64_t most = (int64_t{1} << 32) - static_cast<int64_t>(first & 0xffffffffu);
  return groups < most ? groups : most;
}

class PhiloxAvx2 {
 public:
  static constexpr int kLanes = 8;

  FASTGEN_TARGET_AVX2 PhiloxAvx2(uint64_t seed, uint32_t stream, uint32_t high) {
    const PhiloxKeys keys(seed, stream, high);
    FASTGEN_UNROLL
    for (int round = 0; round < kPhiloxRounds; ++round) {
      FASTGEN_UNROLL
      for (int i = 0; i < 2; ++i) keys_[round][i] = _mm256_set1_epi32(static_cast<int>(keys.of[round][i]));
    }
  }

  // x[i]: component i of kLanes groups from index ``first`` on (its low half). kSplit: even groups in the low 128 bits,
  // odd ones in the high 128 bits.
  template <bool kSplit>
  FASTGEN_TARGET_AVX2 inline void generate(uint32_t first, __m256i (&x)[kGroup]) const {
    const __m256i multiplier0 = _mm256_set1_epi64x(kPhiloxMultiplier0);
    const __m256i multiplier1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
    const __m256i index = _mm256_set1_epi64x(static_cast<int64_t>(first));
    // In this order a shuffle within 128-bit lanes joins the halves.
    const __m256i lanes[2] = {kSplit ? _mm256_set_epi64x(3, 1, 2, 0) : _mm256_set_epi64x(5, 4, 1, 0),
                              kSplit ? _mm256_set_epi64x(7, 5, 6, 4) : _mm256_set_epi64x(7, 6, 3, 2)};
    __m256i c0[2], c1[2], c2[2], c3[2], product0[2], product1[2];
    FASTGEN_UNROLL
    for (int half = 0; half < 2; ++half) {
      c3[half] = _mm256_mul_epu32(_mm256_add_epi64(index, lanes[half]), multiplier0);
      c2[half] = _mm256_xor_si256(high_half(c3[half]), keys_[0][1]);
      c1[half] = _mm256_mul_epu32(c2[half], multiplier1);
      c0[half] = _mm256_xor_si256(high_half(c1[half]), keys_[1][0]);
      c2[half] = _mm256_xor_si256(c3[half], keys_[1][1]);
    }
    FASTGEN_UNROLL
    for (int round = 2; round < kPhiloxRounds; ++round) {
      FASTGEN_UNROLL
      for (int half = 0; half < 2; ++half) {
        product0[half] = _mm256_mul_epu32(c0[half], multiplier0);
        product1[half] = _mm256_mul_epu32(c2[half], multiplier1);
        if (round == kPhiloxRounds - 1) continue;
        c0[half] = _mm256_xor_si256(high_half(product1[half]), _mm256_xor_si256(c1[half], keys_[round][0]));
        c2[half] = round == 2
                       ? _mm256_xor_si256(high_half(product0[half]), keys_[round][1])
                       : _mm256_xor_si256(high_half(product0[half]), _mm256_xor_si256(c3[half], keys_[round][1]));
        c1[half] = product1[half], c3[half] = product0[half];
      }
    }
    constexpr int kLow = _MM_SHUFFLE(2, 0, 2, 0), kHigh = _MM_SHUFFLE(3, 1, 3, 1);
    x[0] = _mm256_xor_si256(join<kHigh>(product1), _mm256_xor_si256(join<kLow>(c1), keys_[kPhiloxRounds - 1][0]));
    x[1] = join<kLow>(product1);
    x[2] = _mm256_xor_si256(join<kHigh>(product0), _mm256_xor_si256(join<kLow>(c3), keys_[kPhiloxRounds - 1][1]));
    x[3] = join<kLow>(product0);
  }

 private:
  FASTGEN_TARGET_AVX2 static inline __m256i high_half(__m256i product) { return _mm256_srli_epi64(product, 32); }

  // The low or the high 32 bits of the lanes of both halves.
  template <int kWhich>
  FASTGEN_TARGET_AVX2 static inline __m256i join(const __m256i (&halves)[2]) {
    return _mm256_castps_si256(
        _mm256_shuffle_ps(_mm256_castsi256_ps(halves[0]), _mm256_castsi256_ps(halves[1]), kWhich));
  }

  __m256i keys_[kPhiloxRounds][2];
};

// The same with vectors of 16 and exclusive ors of three operands.
class PhiloxAvx512 {
 public:
  static constexpr int kLanes = 16;

  FASTGEN_TARGET_AVX512 PhiloxAvx512(uint64_t seed, uint32_t stream, uint32_t high) {
    const PhiloxKeys keys(seed, stream, high);
    FASTGEN_UNROLL
    for (int round = 0; round < kPhiloxRounds; ++round) {
      FASTGEN_UNROLL
      for (int i = 0; i < 2; ++i) keys_[round][i] = _mm512_set1_epi32(static_cast<int>(keys.of[round][i]));
    }
  }

  // x[i]: component i of groups first to first + 15, by the low half of the index.
  FASTGEN_TARGET_AVX512 inline void generate(uint32_t first, __m512i (&x)[kGroup]) const {
    const __m512i multiplier0 = _mm512_set1_epi64(kPhiloxMultiplier0);
    const __m512i multiplier1 = _mm512_set1_epi64(kPhiloxMultiplier1);
    const __m512i index = _mm512_set1_epi64(static_cast<int64_t>(first));
    const __m512i lanes[2] = {_mm512_set_epi64(13, 12, 9, 8, 5, 4, 1, 0), _mm512_set_epi64(15, 14, 11, 10, 7, 6, 3, 2)};
    __m512i c0[2], c1[2], c2[2], c3[2], product0[2], product1[2];
    FASTGEN_UNROLL
    for (int half = 0; half < 2; ++half) {
      c3[half] = _mm512_mul_epu32(_mm512_add_epi64(index, lanes[half]), multiplier0);
      c2[half] = _mm512_xor_si512(high_half(c3[half]), keys_[0][1]);
      c1[half] = _mm512_mul_epu32(c2[half], multiplier1);
      c0[half] = _mm512_xor_si512(high_half(c1[half]), keys_[1][0]);
      c2[half] = _mm512_xor_si512(c3[half], keys_[1][1]);
    }
    FASTGEN_UNROLL
    for (int round = 2; round < kPhiloxRounds; ++round) {
      FASTGEN_UNROLL
      for (int half = 0; half < 2; ++half) {
        product0[half] = _mm512_mul_epu32(c0[half], multiplier0);
        product1[half] = _mm512_mul_epu32(c2[half], multiplier1);
        if (round == kPhiloxRounds - 1) continue;
        c0[half] = exclusive_or(high_half(product1[half]), c1[half], keys_[round][0]);
        c2[half] = round == 2 ? _mm512_xor_si512(high_half(product0[half]), keys_[round][1])
                              : exclusive_or(high_half(product0[half]), c3[half], keys_[round][1]);
        c1[half] = product1[half], c3[half] = product0[half];
      }
    }
    constexpr int kLow = _MM_SHUFFLE(2, 0, 2, 0), kHigh = _MM_SHUFFLE(3, 1, 3, 1);
    x[0] = exclusive_or(join<kHigh>(product1), join<kLow>(c1), keys_[kPhiloxRounds - 1][0]);
    x[1] = join<kLow>(product1);
    x[2] = exclusive_or(join<kHigh>(product0), join<kLow>(c3), keys_[kPhiloxRounds - 1][1]);
    x[3] = join<kLow>(product0);
  }

 private:
  // The high 32 bits of each lane, in its low half. A shuffle, because products and shifts share a port.
  FASTGEN_TARGET_AVX512 static inline __m512i high_half(__m512i product) {
    return _mm512_shuffle_epi32(product, static_cast<_MM_PERM_ENUM>(0xF5));
  }
  FASTGEN_TARGET_AVX512 static inline __m512i exclusive_or(__m512i a, __m512i b, __m512i c) {
    return _mm512_ternarylogic_epi64(a, b, c, 0x96);
  }
  // The low or the high 32 bits of the lanes of both halves.
  template <int kWhich>
  FASTGEN_TARGET_AVX512 static inline __m512i join(const __m512i (&halves)[2]) {
    return _mm512_castps_si512(
        _mm512_shuffle_ps(_mm512_castsi512_ps(halves[0]), _mm512_castsi512_ps(halves[1]), kWhich));
  }

  __m512i keys_[kPhiloxRounds][2];
};

}  // namespace fastgen::cpu

#endif
