// Box-Muller on the bits of Philox while they are in registers: the rounds of Philox wait for one another, and the
// polynomials of the groups before fill the gaps. Groups past the end are computed and dropped, so that a normal has
// the same bits wherever its group is in a call.
#include "common/cpu/normals.h"

#include <cstring>

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
template <int kWidth>
using Unsigned __attribute__((vector_size(kWidth * 4))) = uint32_t;

// Unsigned numbers to floats, without the instruction that AVX-512 has. Both halves are exact, and their sum is rounded
// once, as in the conversion of the whole number.
template <int kWidth>
FASTGEN_HOST_DEVICE void convert_halves(const Ints<kWidth>& bits, Floats<kWidth>& whole) {
  const Ints<kWidth> low = bits & 0xffff, high = (Ints<kWidth>)((Unsigned<kWidth>)bits >> 16);
  whole = __builtin_convertvector(high, Floats<kWidth>) * 65536.0f + __builtin_convertvector(low, Floats<kWidth>);
}

// -2 ln x for normal x > 0: e ln 2 + ln(1 + f) with 1 + f in [sqrt(1/2), sqrt(2)). Minimax polynomial of ln(1 + f) / f,
// relative error 2.6e-8.
template <int kWidth>
FASTGEN_HOST_DEVICE void minus_two_logs(const Floats<kWidth>& x, Floats<kWidth>& log) {
  constexpr int32_t kSqrtHalf = 0x3f3504f3, kExponent = -(1 << 23);
  const Ints<kWidth> exponent = ((Ints<kWidth>)x - kSqrtHalf) & kExponent;  // e 2^23
  const Floats<kWidth> e = __builtin_convertvector(exponent, Floats<kWidth>);
  const Floats<kWidth> f = (Floats<kWidth>)((Ints<kWidth>)x - exponent) - 1.0f;
  const Floats<kWidth> z = f * f;
  Floats<kWidth> even = (-0.17444699f * z - 0.29904538f) * z - 0.39913666f,
                 odd = (0.28733680f * z + 0.33124787f) * z + 0.50004148f;
  even = (even * z - 0.66668373f) * z - 2.0f, odd = odd * z + 0.99999976f;
  const Floats<kWidth> p = odd * f + even;
  log = p * f + e * (-2.0f * 0.693147180559945f * 0x1p-23f);
}

// sin(pi v) for v in [-1/2, 1/2], relative error of the minimax polynomial 5.3e-9.
template <int kWidth>
FASTGEN_HOST_DEVICE void sines(const Floats<kWidth>& v, Floats<kWidth>& sine) {
  const Floats<kWidth> z = v * v;
  Floats<kWidth> p = 0.077560388f * z - 0.59824210f;
  p = p * z + 2.5500698f;
  p = p * z - 5.1677098f;
  p = p * z + 3.1415927f;
  sine = p * v;
}

// box_muller of common/philox.h to a few ulp, with fewer instructions: 2 u1 = n + v with v in [-1/2, 1/2] is exact, the
// sine of the angle is (-1)^n sin(pi v), its cosine (-1)^n sin(pi (1/2 - |v|)). ``root``: the square root of a vector;
// ``convert``: unsigned numbers to floats.
template <int kWidth, typename Root, typename Convert>
FASTGEN_HOST_DEVICE void box_mullers(const Ints<kWidth>& bits0, const Ints<kWidth>& bits1, Floats<kWidth>& n0,
                                     Floats<kWidth>& n1, Root root, Convert convert) {
  Floats<kWidth> u0, angle, squared, radius, sine, cosine;
  convert(bits0, u0), convert(bits1, angle);
  u0 = u0 * 0x1p-32f + 0x1p-33f, angle = angle * 0x1p-31f + 0x1p-32f;
  minus_two_logs<kWidth>(u0, squared);
  root(squared, radius);
  const Floats<kWidth> shifted = angle + kRound, v = angle - (shifted - kRound);
  const Floats<kWidth> other = 0.5f - (Floats<kWidth>)((Ints<kWidth>)v & 0x7fffffff);
  sines<kWidth>(v, sine), sines<kWidth>(other, cosine);
  radius = (Floats<kWidth>)((Ints<kWidth>)radius ^ (Ints<kWidth>)shifted << 31);
  n0 = radius * cosine, n1 = radius * sine;
}

FASTGEN_TARGET_AVX2 void normals_avx2(uint64_t seed, uint64_t first, int64_t groups, float* noise) {
  if (const int64_t alike = alike_groups(first, groups); alike < groups) {
    normals_avx2(seed, first + static_cast<uint64_t>(alike), groups - alike, noise + alike * kGroup);
    groups = alike;
  }
  const PhiloxAvx2 philox(seed, kNoiseStream, static_cast<uint32_t>(first >> 32));
  constexpr int kWidth = philox.kLanes;
  const auto root = [](const Floats<kWidth>& x, Floats<kWidth>& y)
                        FASTGEN_TARGET_AVX2 { y = (Floats<kWidth>)_mm256_sqrt_ps((__m256)x); };
  const auto convert = [](const Ints<kWidth>& bits, Floats<kWidth>& whole)
                           FASTGEN_TARGET_AVX2 { convert_halves<kWidth>(bits, whole); };
  float last[kWidth * kGroup];
  for (int64_t g = 0; g < groups; g += kWidth) {
    __m256i x[kGroup];
    philox.generate<true>(static_cast<uint32_t>(first) + static_cast<uint32_t>(g), x);
    Floats<kWidth> n[kGroup];
    for (int i = 0; i < kGroup; i += 2) {
      box_mullers<kWidth>((Ints<kWidth>)x[i], (Ints<kWidth>)x[i + 1], n[i], n[i + 1], root, convert);
    }
    // Four normals of one group are neighbors.
    const __m256 a = _mm256_unpacklo_ps(n[0], n[1]), b = _mm256_unpackhi_ps(n[0], n[1]);
    const __m256 c = _mm256_unpacklo_ps(n[2], n[3]), d = _mm256_unpackhi_ps(n[2], n[3]);
    float* const out = g + kWidth <= groups ? noise + g * kGroup : last;
    _mm256_storeu_ps(out, _mm256_shuffle_ps(a, c, 0x44));
    _mm256_storeu_ps(out + 8, _mm256_shuffle_ps(a, c, 0xee));
    _mm256_storeu_ps(out + 16, _mm256_shuffle_ps(b, d, 0x44));
    _mm256_storeu_ps(out + 24, _mm256_shuffle_ps(b, d, 0xee));
  }
  const int64_t rest = groups % kWidth;
  memcpy(noise + (groups - rest) * kGroup, last, static_cast<size_t>(rest * kGroup) * sizeof(float));
}

FASTGEN_TARGET_AVX512 void normals_avx512(uint64_t seed, uint64_t first, int64_t groups, float* noise) {
  if (const int64_t alike = alike_groups(first, groups); alike < groups) {
    normals_avx512(seed, first + static_cast<uint64_t>(alike), groups - alike, noise + alike * kGroup);
    groups = alike;
  }
  const PhiloxAvx512 philox(seed, kNoiseStream, static_cast<uint32_t>(first >> 32));
  constexpr int kWidth = philox.kLanes;
  const auto root = [](const Floats<kWidth>& x, Floats<kWidth>& y)
                        FASTGEN_TARGET_AVX512 { y = (Floats<kWidth>)_mm512_sqrt_ps((__m512)x); };
  const auto convert = [](const Ints<kWidth>& bits, Floats<kWidth>& whole)
                           FASTGEN_TARGET_AVX512 { whole = (Floats<kWidth>)_mm512_cvtepu32_ps((__m512i)bits); };
  float last[kWidth * kGroup];
  for (int64_t g = 0; g < groups; g += kWidth) {
    __m512i x[kGroup];
    philox.generate(static_cast<uint32_t>(first) + static_cast<uint32_t>(g), x);
    Floats<kWidth> n[kGroup];
    for (int i = 0; i < kGroup; i += 2) {
      box_mullers<kWidth>((Ints<kWidth>)x[i], (Ints<kWidth>)x[i + 1], n[i], n[i + 1], root, convert);
    }
    const __m512 a = _mm512_unpacklo_ps(n[0], n[1]), b = _mm512_unpackhi_ps(n[0], n[1]);
    const __m512 c = _mm512_unpacklo_ps(n[2], n[3]), d = _mm512_unpackhi_ps(n[2], n[3]);
    // rows[i]: groups i, 4 + i, 8 + i and 12 + i.
    const __m512 rows[4] = {_mm512_shuffle_ps(a, c, 0x44), _mm512_shuffle_ps(a, c, 0xee), _mm512_shuffle_ps(b, d, 0x44),
                            _mm512_shuffle_ps(b, d, 0xee)};
    const __m512 e = _mm512_shuffle_f32x4(rows[0], rows[1], 0x88), f = _mm512_shuffle_f32x4(rows[0], rows[1], 0xdd);
    const __m512 h = _mm512_shuffle_f32x4(rows[2], rows[3], 0x88), k = _mm512_shuffle_f32x4(rows[2], rows[3], 0xdd);
    // e: groups 0, 8, 1, 9; h: 2, 10, 3, 11; f: 4, 12, 5, 13; k: 6, 14, 7, 15.
    float* const out = g + kWidth <= groups ? noise + g * kGroup : last;
    _mm512_storeu_ps(out, _mm512_shuffle_f32x4(e, h, 0x88));
    _mm512_storeu_ps(out + 16, _mm512_shuffle_f32x4(f, k, 0x88));
    _mm512_storeu_ps(out + 32, _mm512_shuffle_f32x4(e, h, 0xdd));
    _mm512_storeu_ps(out + 48, _mm512_shuffle_f32x4(f, k, 0xdd));
  }
  const int64_t rest = groups % kWidth;
  memcpy(noise + (groups - rest) * kGroup, last, static_cast<size_t>(rest * kGroup) * sizeof(float));
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
