// Box-Muller on the bits of Philox while they are in registers: the rounds of Philox wait for one another, and the
// polynomials of the groups before fill the gaps.
#include "common/cpu/normals.h"

#include "common/cpu/levels.h"
#include "common/cpu/philox_vector.h"
#include "common/philox.h"

namespace fastgen::cpu {
namespace {

void normals_generic(uint64_t seed, uint64_t first, int64_t groups, float* noise) {
  constexpr int64_t kAtOnce = 64;
  uint32_t bits[kGroup][kAtOnce];
  for (int64_t begin = 0; begin < groups; begin += kAtOnce) {
    const int64_t count = groups - begin < kAtOnce ? groups - begin : kAtOnce;
    for (int64_t g = 0; g < count; ++g) {
      const Philox4 group = philox(seed, first + static_cast<uint64_t>(begin + g), kNoiseStream);
      for (int i = 0; i < kGroup; ++i) bits[i][g] = group.x[i];
    }
    float* out = noise + begin * kGroup;
#pragma omp simd
    for (int64_t g = 0; g < count; ++g) {
      box_muller(to_uniform(bits[0][g]), to_uniform(bits[1][g]), out[4 * g], out[4 * g + 1]);
      box_muller(to_uniform(bits[2][g]), to_uniform(bits[3][g]), out[4 * g + 2], out[4 * g + 3]);
    }
  }
}

#if FASTGEN_X86_LEVELS

// Vectors of the compiler's: operators work on each element.
template <int kWidth>
using Floats __attribute__((vector_size(kWidth * 4))) = float;
template <int kWidth>
using Ints __attribute__((vector_size(kWidth * 4))) = int32_t;

// Rounds as the conversion of the whole number does: both halves are exact, and their sum is rounded once.
template <int kWidth>
FASTGEN_HOST_DEVICE void to_uniforms(const Ints<kWidth>& bits, Floats<kWidth>& uniform) {
  const Ints<kWidth> low = bits & 0xffff, high = bits >> 16 & 0xffff;
  const Floats<kWidth> whole =
      __builtin_convertvector(high, Floats<kWidth>) * 65536.0f + __builtin_convertvector(low, Floats<kWidth>);
  uniform = whole * 0x1p-32f + 0x1p-33f;
}

// log_float of common/math.h.
template <int kWidth>
FASTGEN_HOST_DEVICE void log_floats(const Floats<kWidth>& x, Floats<kWidth>& log) {
  constexpr int32_t kSqrtHalf = 0x3f3504f3;
  const Ints<kWidth> shifted = (Ints<kWidth>)x - kSqrtHalf;
  const Floats<kWidth> e = __builtin_convertvector(shifted >> 23, Floats<kWidth>);
  const Floats<kWidth> f = (Floats<kWidth>)((shifted & 0x007fffff) + kSqrtHalf) - 1.0f, z = f * f;
  Floats<kWidth> p = 7.0376836292e-2f * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = p * f * z;
  p = p - 0.5f * z;
  log = (f + p) + 0.693147180559945f * e;
}

// box_muller of common/philox.h. ``root``: the square root of a vector.
template <int kWidth, typename Root>
FASTGEN_HOST_DEVICE void box_mullers(const Ints<kWidth>& bits0, const Ints<kWidth>& bits1, Floats<kWidth>& n0,
                                     Floats<kWidth>& n1, Root root) {
  Floats<kWidth> u0, u1, log;
  to_uniforms<kWidth>(bits0, u0), to_uniforms<kWidth>(bits1, u1), log_floats<kWidth>(u0, log);
  const Floats<kWidth> squared = -2.0f * log;
  Floats<kWidth> radius;
  root(squared, radius);
  const Floats<kWidth> angle = 2.0f * u1, shifted = 2.0f * angle + kRound, rounded = shifted - kRound;
  const Floats<kWidth> rest = 3.14159265358979324f * (angle - 0.5f * rounded), z = rest * rest;
  const Floats<kWidth> odd_part = (-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f;
  const Floats<kWidth> sine = odd_part * z * rest + rest;
  const Floats<kWidth> even_part = (2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f;
  const Floats<kWidth> cosine = even_part * z * z - 0.5f * z + 1.0f;
  const Ints<kWidth> quadrant = (Ints<kWidth>)shifted, odd = -(quadrant & 1);
  const Ints<kWidth> exchanged = ((Ints<kWidth>)sine ^ (Ints<kWidth>)cosine) & odd;
  // cos is negative in quadrants 1 and 2, sin in 2 and 3.
  const Ints<kWidth> cos_sign = ((quadrant + 1) & 2) << 30, sin_sign = (quadrant & 2) << 30;
  n0 = radius * (Floats<kWidth>)((Ints<kWidth>)cosine ^ exchanged ^ cos_sign);
  n1 = radius * (Floats<kWidth>)((Ints<kWidth>)sine ^ exchanged ^ sin_sign);
}

FASTGEN_TARGET_AVX2 void normals_avx2(uint64_t seed, uint64_t first, int64_t groups, float* noise) {
  const PhiloxAvx2 philox(seed, kNoiseStream);
  constexpr int kWidth = philox.kLanes;
  const auto root = [](const Floats<kWidth>& x, Floats<kWidth>& y)
                        FASTGEN_TARGET_AVX2 { y = (Floats<kWidth>)_mm256_sqrt_ps((__m256)x); };
  int64_t g = 0;
  for (; g + kWidth <= groups; g += kWidth) {
    __m256i x[kGroup];
    philox(first + static_cast<uint64_t>(g), x);
    Floats<kWidth> n[kGroup];
    for (int i = 0; i < kGroup; i += 2) {
      box_mullers<kWidth>((Ints<kWidth>)x[i], (Ints<kWidth>)x[i + 1], n[i], n[i + 1], root);
    }
    // Four normals of one group are neighbors.
    const __m256 a = _mm256_unpacklo_ps(n[0], n[1]), b = _mm256_unpackhi_ps(n[0], n[1]);
    const __m256 c = _mm256_unpacklo_ps(n[2], n[3]), d = _mm256_unpackhi_ps(n[2], n[3]);
    const __m256 rows[4] = {_mm256_shuffle_ps(a, c, 0x44), _mm256_shuffle_ps(a, c, 0xee), _mm256_shuffle_ps(b, d, 0x44),
                            _mm256_shuffle_ps(b, d, 0xee)};
    float* out = noise + g * kGroup;
    _mm256_storeu_ps(out, _mm256_permute2f128_ps(rows[0], rows[1], 0x20));
    _mm256_storeu_ps(out + 8, _mm256_permute2f128_ps(rows[2], rows[3], 0x20));
    _mm256_storeu_ps(out + 16, _mm256_permute2f128_ps(rows[0], rows[1], 0x31));
    _mm256_storeu_ps(out + 24, _mm256_permute2f128_ps(rows[2], rows[3], 0x31));
  }
  normals_generic(seed, first + static_cast<uint64_t>(g), groups - g, noise + g * kGroup);
}

FASTGEN_TARGET_AVX512 void normals_avx512(uint64_t seed, uint64_t first, int64_t groups, float* noise) {
  const PhiloxAvx512 philox(seed, kNoiseStream);
  constexpr int kWidth = philox.kLanes;
  const auto root = [](const Floats<kWidth>& x, Floats<kWidth>& y)
                        FASTGEN_TARGET_AVX512 { y = (Floats<kWidth>)_mm512_sqrt_ps((__m512)x); };
  int64_t g = 0;
  for (; g + kWidth <= groups; g += kWidth) {
    __m512i x[kGroup];
    philox(first + static_cast<uint64_t>(g), x);
    Floats<kWidth> n[kGroup];
    for (int i = 0; i < kGroup; i += 2) {
      box_mullers<kWidth>((Ints<kWidth>)x[i], (Ints<kWidth>)x[i + 1], n[i], n[i + 1], root);
    }
    const __m512 a = _mm512_unpacklo_ps(n[0], n[1]), b = _mm512_unpackhi_ps(n[0], n[1]);
    const __m512 c = _mm512_unpacklo_ps(n[2], n[3]), d = _mm512_unpackhi_ps(n[2], n[3]);
    // rows[i]: groups i, 4 + i, 8 + i and 12 + i.
    const __m512 rows[4] = {_mm512_shuffle_ps(a, c, 0x44), _mm512_shuffle_ps(a, c, 0xee), _mm512_shuffle_ps(b, d, 0x44),
                            _mm512_shuffle_ps(b, d, 0xee)};
    const __m512 e = _mm512_shuffle_f32x4(rows[0], rows[1], 0x88), f = _mm512_shuffle_f32x4(rows[0], rows[1], 0xdd);
    const __m512 h = _mm512_shuffle_f32x4(rows[2], rows[3], 0x88), k = _mm512_shuffle_f32x4(rows[2], rows[3], 0xdd);
    // e: groups 0, 8, 1, 9; h: 2, 10, 3, 11; f: 4, 12, 5, 13; k: 6, 14, 7, 15.
    float* out = noise + g * kGroup;
    _mm512_storeu_ps(out, _mm512_shuffle_f32x4(e, h, 0x88));
    _mm512_storeu_ps(out + 16, _mm512_shuffle_f32x4(f, k, 0x88));
    _mm512_storeu_ps(out + 32, _mm512_shuffle_f32x4(e, h, 0xdd));
    _mm512_storeu_ps(out + 48, _mm512_shuffle_f32x4(f, k, 0xdd));
  }
  normals_generic(seed, first + static_cast<uint64_t>(g), groups - g, noise + g * kGroup);
}

#endif

}  // namespace

void standard_normals(uint64_t seed, uint64_t first, int64_t groups, float* noise) {
#if FASTGEN_X86_LEVELS
  pick(normals_generic, normals_avx2, normals_avx512)(seed, first, groups, noise);
#else
  normals_generic(seed, first, groups, noise);
#endif
}

}  // namespace fastgen::cpu
