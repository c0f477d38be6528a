// Arithmetic along the rows of tiles in vectors: exponentials, maxima and sums.
#pragma once

#include "attention/cpu/problem.h"
#include "attention/cpu/products.h"
#include "common/cpu/levels.h"
#include "common/math.h"

// GCC takes builtins of AVX-512 in a function for all levels, which is inlined into that of the level.
#if FASTGEN_X86_LEVELS && !defined(__clang__)
#define FASTGEN_SCALE_VECTORS 1
#include <immintrin.h>
#else
#define FASTGEN_SCALE_VECTORS 0
#endif

namespace fastgen::cpu {

constexpr int kLanes = 32;  // columns at a time
static_assert(kTile % kLanes == 0, "a tile is whole lanes, which are an even number of vectors");

// The columns of a tile with ``keys`` keys that are written: products read whole groups of keys, rows whole lanes.
FASTGEN_HOST_DEVICE constexpr int64_t written_width(int64_t keys) { return round_up(round_up(keys, kRowStep), kLanes); }

template <int kWidth>
using Ints __attribute__((vector_size(kWidth * sizeof(int32_t)))) = int32_t;

template <int kWidth>
FASTGEN_HOST_DEVICE Vector<kWidth>& vector_at(float* data) {
  return *reinterpret_cast<Vector<kWidth>*>(data);
}
template <int kWidth>
FASTGEN_HOST_DEVICE const Vector<kWidth>& vector_at(const float* data) {
  return *reinterpret_cast<const Vector<kWidth>*>(data);
}

// shifted, n and p of e^x = 2^n p: n is x / ln 2 rounded, also in the low bits of shifted (Cephes, expf).
template <int kWidth>
FASTGEN_HOST_DEVICE void reduce_exp(const Vector<kWidth>& x, Vector<kWidth>& shifted, Vector<kWidth>& n,
                                    Vector<kWidth>& p) {
  shifted = x * 1.44269504088896341f + kRound, n = shifted - kRound;
  const Vector<kWidth> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
}

// x = e^x for x <= 0, or a little above, or NaN, with the values of exp_float of common/math.h: 0 up to -87.3365479.
// Far above 0 it is undefined.
template <int kWidth>
FASTGEN_HOST_DEVICE void exp_of_weight(Vector<kWidth>& x) {
  using Floats = Vector<kWidth>;
  constexpr float kSmallest = -87.3365479f;
  Floats shifted, n, p;
  reduce_exp<kWidth>(x, shifted, n, p);
#if FASTGEN_SCALE_VECTORS
  if constexpr (kWidth == 16) {
    constexpr int kCurrentRounding = 4;
    const auto kept = __builtin_ia32_cmpps512_mask(x, kSmallest - Floats{}, _CMP_NLE_UQ, 0xffff, kCurrentRounding);
    x = __builtin_ia32_scalefps512_mask(p, n, Floats{}, kept, kCurrentRounding);
    return;
  }
#endif
  // A NaN of p passes through the product with a power of two, whatever that is.
  const Floats power = (Floats)(((Ints<kWidth>)shifted << 23) + 0x3f800000);
  x = (Floats)((Ints<kWidth>)(p * power) & ~(x <= kSmallest));
}

// other[i] = value[i ^ kStep].
template <int kWidth, int kStep>
FASTGEN_HOST_DEVICE void exchange(const Vector<kWidth>& value, Vector<kWidth>& other) {
#if defined(__clang__)
  for (int i = 0; i < kWidth; ++i) other[i] = value[i ^ kStep];
#else
  Ints<kWidth> lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i ^ kStep;
  other = __builtin_shuffle(value, lane);
#endif
}

// The sum, or the largest, of the elements of a vector, in registers: log2(kWidth) steps.
template <int kWidth, bool kSum, int kStep = kWidth / 2>
FASTGEN_HOST_DEVICE float fold(Vector<kWidth>& value) {
  if constexpr (kStep == 0) {
    return value[0];
  } else {
    Vector<kWidth> other;
    exchange<kWidth, kStep>(value, other);
    value = kSum ? value + other : (other > value ? other : value);
    return fold<kWidth, kSum, kStep / 2>(value);
  }
}

// Two partial results of a row, which hides the latency of additions.
template <int kWidth, bool kSum>
struct Partials {
  Vector<kWidth> even, odd;

  FASTGEN_HOST_DEVICE explicit Partials(float value) : even(value - Vector<kWidth>{}), odd(even) {}
  FASTGEN_HOST_DEVICE void add(Vector<kWidth>& partial, const Vector<kWidth>& term) {
    partial = kSum ? partial + term : (term > partial ? term : partial);
  }
  FASTGEN_HOST_DEVICE float result() {
    add(even, odd);
    return fold<kWidth, kSum>(even);
  }
};
template <int kWidth>
using Sums = Partials<kWidth, true>;
template <int kWidth>
using Maxima = Partials<kWidth, false>;  // NaN is ignored

// rowsum(dO * O) - dlse of one row. ``grad_lse`` may be absent.
FASTGEN_HOST_DEVICE float row_delta(const Problem& p, const Operand& grad_out, const Operand& out,
                                    const Operand& grad_lse, int64_t batch, int64_t head, int64_t row) {
  const float *a = grad_out.at(batch, head, row), *b = out.at(batch, head, row);
  constexpr int kSums = 8;
  float sums[kSums] = {};
  int64_t c = 0;
  for (; c + kSums <= p.value_dim; c += kSums) {
    for (int i = 0; i < kSums; ++i) sums[i] += a[c + i] * b[c + i];
  }
  for (int i = 0; c + i < p.value_dim; ++i) sums[i] += a[c + i] * b[c + i];
  const float sum = ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
  return sum - (grad_lse.data == nullptr ? 0.0f : *grad_lse.at(batch, head, row));
}

// lse of one row, +inf for a fully masked one: its weights e^(S - lse) are then 0. NaN for one with an infinite score,
// whose weights are NaN by the formula.
FASTGEN_HOST_DEVICE float row_lse(const Operand& lse, int64_t batch, int64_t head, int64_t row) {
  const float value = *lse.at(batch, head, row);
  return value == kInfinity ? kNan : value == -kInfinity ? kInfinity : value;
}

}  // namespace fastgen::cpu
