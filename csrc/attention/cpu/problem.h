// A call of attention as the CPU kernels see it: float32, torch-free.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "attention/cpu/dropout.h"
#include "attention/cpu/products.h"
#include "common/types.h"

namespace fastgen::cpu {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// (B, H, rows, D) with a contiguous last dim, or (B, H, rows). Strides of batch, head and row, in elements.
template <typename T>
struct Strided {
  T* data = nullptr;  // null: absent
  int64_t strides[3] = {};

  FASTGEN_HOST_DEVICE T* at(int64_t batch, int64_t head, int64_t row) const {
    return data + batch * strides[0] + head * strides[1] + row * strides[2];
  }
};
using Operand = Strided<const float>;
using Result = Strided<float>;

// (B, H, N, M), strides of 0 where it is broadcast; that of M is 0 or 1. Exactly one of the pointers, or none.
struct Mask {
  const bool* allowed = nullptr;
  const float* added = nullptr;
  int64_t strides[4] = {};

  explicit operator bool() const { return allowed != nullptr || added != nullptr; }

  // What is added to the scores of one row.
  FASTGEN_HOST_DEVICE const float* row(int64_t batch, int64_t head, int64_t row) const {
    return added + batch * strides[0] + head * strides[1] + row * strides[2];
  }

  // Masks ``count`` scores of one row, from key ``first`` on.
  FASTGEN_HOST_DEVICE void apply(int64_t batch, int64_t head, int64_t row, int64_t first, int64_t count,
                                 float* __restrict__ scores) const {
    const int64_t at = batch * strides[0] + head * strides[1] + row * strides[2] + first * strides[3];
    if (added != nullptr) {
      const float* __restrict__ mask = added + at;
      if (strides[3] == 0) {
        for (int64_t j = 0; j < count; ++j) scores[j] += *mask;
      } else {
        for (int64_t j = 0; j < count; ++j) scores[j] += mask[j];
      }
    } else if (strides[3] == 0) {
      if (!allowed[at]) std::fill_n(scores, count, -kInfinity);
    } else {
      // Without a branch, which compilers do not vectorize here.
      const uint8_t* __restrict__ mask = reinterpret_cast<const uint8_t*>(allowed + at);
      constexpr uint32_t kMinusInfinity = 0xff800000u;
      for (int64_t j = 0; j < count; ++j) {
        const uint32_t kept = 0u - static_cast<uint32_t>(mask[j] != 0);
        scores[j] = bits_to_float((float_to_bits(scores[j]) & kept) | (kMinusInfinity & ~kept));
      }
    }
  }
};

struct Problem {
  Operand query, key, value;
  Mask mask;
  const int64_t* seeds = nullptr;  // null: no dropout
  int64_t rows_per_seed = 1;
  float dropout_p = 0.0f, dropout_factor = 1.0f;
  int64_t batch, heads, key_heads, queries, keys, key_dim, value_dim;
  int64_t window_left = -1, window_right = -1;  // query i attends to keys i - left to i + right; -1: unbounded
  float scale;

  // Keys that a query attends to: [first_key, end_key), which may be empty.
  FASTGEN_HOST_DEVICE int64_t first_key(int64_t row) const {
    return window_left < 0 ? 0 : std::clamp<int64_t>(row - window_left, 0, keys);
  }
  FASTGEN_HOST_DEVICE int64_t end_key(int64_t row) const {
    return window_right < 0 ? keys : std::clamp<int64_t>(row + window_right + 1, 0, keys);
  }

  // Masks the kTile scores of one row from key ``key`` on, also beyond the last key.
  FASTGEN_HOST_DEVICE void mask_scores(int64_t b, int64_t head, int64_t row, int64_t key, float* scores) const {
    const int64_t from = std::clamp<int64_t>(first_key(row) - key, 0, kTile);
    const int64_t to = std::clamp<int64_t>(end_key(row) - key, from, kTile);
    if (mask) mask.apply(b, head, row, key + from, to - from, scores + from);
    std::fill_n(scores, from, -kInfinity);
    std::fill(scores + to, scores + kTile, -kInfinity);
  }

  // Tiles of at most ``most`` query rows, about equal: their rows, a multiple of ``step``.
  int64_t tile_rows(int64_t most, int64_t step) const {
    const int64_t count = std::max<int64_t>(1, ceil_div(queries, most));
    return std::max(step, ceil_div(ceil_div(queries, count), step) * step);
  }

  // Dropout's factors of one row for the keys [first, end).
  void keep_row(int64_t b, int64_t head, int64_t row, int64_t first, int64_t end, float* keep) const {
    DropoutParams p = {};
    p.seeds = seeds, p.rows_per_seed = rows_per_seed, p.keys = keys, p.first_key = first, p.last_key = end;
    p.p = dropout_p, p.factor = dropout_factor;
    dropout_keep_row(p, (b * heads + head) * queries + row, keep);
  }
};

}  // namespace fastgen::cpu
