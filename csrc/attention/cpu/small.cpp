// Attention of so few scores that a call costs more than its arithmetic: the plain formula, called through ctypes with
// pointers. One row of scores at a time.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "attention/cpu/dropout.h"
#include "common/cpu/convert.h"
#include "common/cpu/levels.h"
#include "common/cpu/sums.h"
#include "common/exported.h"
#include "common/math.h"

namespace fastgen::cpu {
namespace {

constexpr int64_t kMostKeys = 256, kMostDim = 256;
constexpr int64_t kLanes = 16;  // partial sums of a product
enum class MaskKind : int64_t { kNone, kBoolean, kAdded };

// fastgen/ops/attention/small.py fills it. Shapes (B, H, N, D), (B, H, M, D) and (B, H, N, M); the last stride of
// query, key, value and out is 1. A mask's strides are 0 where it is broadcast.
struct SmallParams {
  int64_t dtype;  // of DType
  int64_t batch, heads, queries, keys, dim, causal;
  MaskKind mask_kind;
  int64_t query_strides[3], key_strides[3], value_strides[3], out_strides[3], mask_strides[4];
  double scale;
};

struct SmallData {
  const void *query, *key, *value, *mask;
  void* out;
  const DropoutParams* dropout;  // nullptr: none
};

template <typename T>
FASTGEN_HOST_DEVICE const T* at(const void* data, const int64_t* strides, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const T*>(data) + batch * strides[0] + head * strides[1] + row * strides[2];
}

FASTGEN_HOST_DEVICE void mask_scores(const SmallParams& p, const void* mask, int64_t batch, int64_t head, int64_t row,
                                     float* scores) {
  if (p.causal) {
    for (int64_t j = row + 1; j < p.keys; ++j) scores[j] = -INFINITY;
  }
  if (p.mask_kind == MaskKind::kNone) return;
  const int64_t first = batch * p.mask_strides[0] + head * p.mask_strides[1] + row * p.mask_strides[2];
  for (int64_t j = 0; j < p.keys; ++j) {
    const int64_t index = first + j * p.mask_strides[3];
    if (p.mask_kind == MaskKind::kAdded) {
      scores[j] += static_cast<const float*>(mask)[index];
    } else if (static_cast<const uint8_t*>(mask)[index] == 0) {
      scores[j] = -INFINITY;
    }
  }
}

// Returns whether the caller has to compute the result otherwise: see fastgen_small_attention.
template <typename T>
FASTGEN_HOST_DEVICE bool attend(const SmallParams& p, const SmallData& data) {
  float query[kMostDim], scores[kMostKeys], keep[kMostKeys], out[kMostDim];
  bool refused = false;
  for (int64_t index = 0; index < p.batch * p.heads * p.queries; ++index) {
    const int64_t row = index % p.queries, head = index / p.queries % p.heads, batch = index / p.queries / p.heads;
    const T* const given = at<T>(data.query, p.query_strides, batch, head, row);
    for (int64_t c = 0; c < p.dim; ++c) query[c] = to_float(given[c]) * static_cast<float>(p.scale);
    for (int64_t j = 0; j < p.keys; ++j) {
      const T* const key = at<T>(data.key, p.key_strides, batch, head, j);
      scores[j] = sum_row<kLanes>(p.dim, [&](int64_t c) { return query[c] * to_float(key[c]); });
    }
    mask_scores(p, data.mask, batch, head, row, scores);
    const float row_max = largest<kLanes>(p.keys, [&](int64_t j) { return scores[j]; });
    const float shift = row_max == -INFINITY ? 0.0f : row_max;  // -inf - -inf is NaN
    for (int64_t j = 0; j < p.keys; ++j) scores[j] = exp_float(scores[j] - shift);
    const float total = sum_row<kLanes>(p.keys, [&](int64_t j) { return scores[j]; });
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    refused |= total == 0.0f && p.mask_kind == MaskKind::kNone;
    if (data.dropout != nullptr) {
      dropout_keep_row(*data.dropout, index, keep);
      for (int64_t j = 0; j < p.keys; ++j) scores[j] *= keep[j];
    }
    std::fill_n(out, p.dim, 0.0f);
    for (int64_t j = 0; j < p.keys; ++j) {
      const T* const value = at<T>(data.value, p.value_strides, batch, head, j);
      for (int64_t c = 0; c < p.dim; ++c) out[c] += scores[j] * to_float(value[c]);
    }
    T* const result =
        static_cast<T*>(data.out) + batch * p.out_strides[0] + head * p.out_strides[1] + row * p.out_strides[2];
    bool has_nan = false;
    for (int64_t c = 0; c < p.dim; ++c) {
      const float value = out[c] * inverse;
      has_nan |= value != value;
      result[c] = from_float<T>(value);
    }
    refused |= has_nan && p.mask_kind != MaskKind::kNone;
  }
  return refused;
}

FASTGEN_HOST_DEVICE bool attend_any(const SmallParams& p, const SmallData& data) {
  switch (static_cast<DType>(p.dtype)) {
    case DType::kFloat32: return attend<float>(p, data);
    case DType::kFloat16: return attend<Half>(p, data);
    default: return attend<BFloat16>(p, data);
  }
}

int attend_checked(const void* params, const SmallData& data) {
  const SmallParams& p = *static_cast<const SmallParams*>(params);
  if (data.query == nullptr || data.key == nullptr || data.value == nullptr || data.out == nullptr) return 1;
  if (data.mask == nullptr && p.mask_kind != MaskKind::kNone) return 1;
  return for_level<attend_any>()(p, data) ? 1 : 0;
}

}  // namespace
}  // namespace fastgen::cpu

// The largest number of keys, and of columns of a head.
FASTGEN_EXPORTED int64_t fastgen_small_attention_limit() {
  return std::min(fastgen::cpu::kMostKeys, fastgen::cpu::kMostDim);
}

// Writes out and returns 0. Returns 1 where the result may not be that of the other implementations: a row without
// weights and without a mask, a NaN beside a mask (masked keys may hold it), or a tensor without memory.
FASTGEN_EXPORTED int fastgen_small_attention(const void* params, const void* query, const void* key, const void* value,
                                             const void* mask, void* out) {
  return fastgen::cpu::attend_checked(params, {query, key, value, mask, out, nullptr});
}

// The same with dropout, by one seed.
FASTGEN_EXPORTED int fastgen_small_attention_dropout(const void* params, const void* query, const void* key,
                                                     const void* value, const void* mask, void* out,
                                                     const int64_t* seed, double dropout_p) {
  const auto& p = *static_cast<const fastgen::cpu::SmallParams*>(params);
  const float factor = 1.0f / static_cast<float>(1.0 - dropout_p);
  const fastgen::cpu::DropoutParams dropout{
      seed,   p.batch * p.heads * p.queries, 0,      p.batch, p.heads, p.queries, 0, p.queries, p.keys, 0,
      p.keys, static_cast<float>(dropout_p), factor, nullptr};
  return fastgen::cpu::attend_checked(params, {query, key, value, mask, out, &dropout});
}
