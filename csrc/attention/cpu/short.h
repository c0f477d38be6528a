// Attention with few keys: whole rows of scores are in L1, so the softmax is not online, and no block is padded.
//
// Products read their left operand by element, and take as many rows as there are: a remainder has register tiles of
// its own. Panels are those of products.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/cpu/backward.h"
#include "attention/cpu/forward.h"
#include "attention/cpu/key_sums.h"
#include "attention/cpu/memory.h"
#include "attention/cpu/products.h"
#include "attention/cpu/rows.h"

namespace fastgen::cpu {

constexpr int64_t kShortKeys = 256;
constexpr int kScoreRow = kShortKeys + 16;  // an odd number of cache lines: a column is in all cache sets
static_assert(kScoreRow / 16 % 2 == 1, "rows of scores are an odd number of cache lines apart");

// Whether the functions below serve. In the backward pass a head is one task.
inline bool has_short_forward(const Problem& p) { return p.keys <= kShortKeys; }
inline bool has_short_backward(const Problem& p) {
  constexpr int64_t kFewQueries = 96;
  return p.keys <= kShortKeys && (p.queries <= kFewQueries || p.batch * p.key_heads >= kManyTasks);
}

// The passes of forward.h and backward.h.
void short_attention_forward(const ForwardParams& params);
void short_attention_backward(const BackwardParams& params);

// Where the left operand of a product is: element (i, k) at [k / kChunk][i * kRow + k % kChunk * kStep]. kChunk 0: one.
template <int kRowStride, int kStepStride, int kChunkSteps>
struct LeftOperand {
  static constexpr int kRow = kRowStride, kStep = kStepStride, kChunk = kChunkSteps;
};

template <int kWidth, int kGroup>
struct ShortProducts {
  static constexpr int kPanel = 2 * kWidth;
  using InPanels = LeftOperand<kPanel, 1, kPanel>;
  using InScores = LeftOperand<kScoreRow, 1, 0>;
  using InScoresAcross = LeftOperand<1, kScoreRow, 0>;

  // c[i][j] = (kAdd ? c[i][j] : 0) + sum over k of a(i, k) * b[k * kPanel + j], for kRows rows and kVectors vectors.
  template <typename Left, int kRows, int kVectors, int kCRow, bool kAdd>
  FASTGEN_HOST_DEVICE static void multiply(const float* __restrict__ a, int64_t a_chunk, const float* __restrict__ b,
                                           int64_t steps, float* __restrict__ c) {
    Vector<kWidth> sums[kRows][kVectors] = {};
    for (int64_t left = steps; left > 0; left -= Left::kChunk, a += a_chunk) {
      const int64_t count = Left::kChunk == 0 ? left : std::min<int64_t>(Left::kChunk, left);
      for (int64_t k = 0; k < count; ++k, b += kPanel) {
        Vector<kWidth> row[kVectors];
        FASTGEN_UNROLL
        for (int v = 0; v < kVectors; ++v) row[v] = vector_at<kWidth>(b + v * kWidth);
        FASTGEN_UNROLL
        for (int i = 0; i < kRows; ++i) {
          const float factor = a[i * Left::kRow + k * Left::kStep];
          FASTGEN_UNROLL
          for (int v = 0; v < kVectors; ++v) sums[i][v] += factor * row[v];
        }
      }
      if (Left::kChunk == 0) break;
    }
    FASTGEN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      FASTGEN_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        Vector<kWidth>& entry = vector_at<kWidth>(c + i * kCRow + v * kWidth);
        entry = kAdd ? entry + sums[i][v] : sums[i][v];
      }
    }
  }

  // The same for ``rows`` rows: tiles of kMost rows, then of fewer.
  template <typename Left, int kMost, int kVectors, int kCRow, bool kAdd>
  FASTGEN_HOST_DEVICE static void multiply_rows(const float* a, int64_t a_chunk, int64_t rows, const float* b,
                                                int64_t steps, float* c) {
    for (; rows >= kMost; rows -= kMost, a += kMost * Left::kRow, c += kMost * kCRow) {
      multiply<Left, kMost, kVectors, kCRow, kAdd>(a, a_chunk, b, steps, c);
    }
    constexpr int kLess = kMost > 8 ? 8 : kMost > 4 ? 4 : kMost / 2;
    if constexpr (kLess > 0) {
      if (rows > 0) multiply_rows<Left, kLess, kVectors, kCRow, kAdd>(a, a_chunk, rows, b, steps, c);
    }
  }

  // C (rows, columns) in panels c_panel apart, of rows kCRow apart, from B in Panels b_panel apart.
  template <typename Left, int kCRow, bool kAdd>
  FASTGEN_HOST_DEVICE static void product(const float* a, int64_t a_chunk, int64_t rows, const float* b,
                                          int64_t b_panel, int64_t steps, int64_t columns, float* c, int64_t c_panel) {
    for (; columns > kWidth; columns -= kPanel, b += b_panel, c += c_panel) {
      multiply_rows<Left, kGroup, 2, kCRow, kAdd>(a, a_chunk, rows, b, steps, c);
    }
    if (columns > 0) multiply_rows<Left, kRowStep, 1, kCRow, kAdd>(a, a_chunk, rows, b, steps, c);
  }

  // (rows, dim) to Panels of ``panel_rows`` rows, row by row, as hardware prefetchers expect.
  FASTGEN_HOST_DEVICE static void pack_rows(const float* __restrict__ from, int64_t stride, int64_t rows, int64_t dim,
                                            float* __restrict__ to, int64_t panel_rows) {
    for (int64_t i = 0; i < rows; ++i, from += stride, to += kPanel) {
      float* target = to;
      int64_t d = 0;
      for (; d + kPanel <= dim; d += kPanel, target += panel_rows * kPanel) {
        FASTGEN_UNROLL
        for (int v = 0; v < 2; ++v) vector_at<kWidth>(target + v * kWidth) = vector_at<kWidth>(from + d + v * kWidth);
      }
      if (d == dim) continue;
      for (int64_t c = 0; c < kPanel; ++c) target[c] = d + c < dim ? from[d + c] : 0.0f;
    }
  }

  // Rows of Panels, ``panel_rows`` in a panel, times ``factor`` and those of ``factors`` (null: 1).
  FASTGEN_HOST_DEVICE static void store_rows(const float* __restrict__ from, int64_t panel_rows, int64_t rows,
                                             int64_t dim, const float* factors, float factor, float* __restrict__ to,
                                             int64_t stride) {
    for (int64_t i = 0; i < rows; ++i, from += kPanel, to += stride) {
      const float by = factors == nullptr ? factor : factors[i] * factor;
      const float* row = from;
      int64_t d = 0;
      for (; d + kPanel <= dim; d += kPanel, row += panel_rows * kPanel) {
        FASTGEN_UNROLL
        for (int v = 0; v < 2; ++v) vector_at<kWidth>(to + d + v * kWidth) = vector_at<kWidth>(row + v * kWidth) * by;
      }
      for (int64_t c = 0; d + c < dim; ++c) to[d + c] = row[c] * by;
    }
  }
};

// Query rows of a tile: its scores, ``tiles`` of them, take a good half of L1, but of many keys there are 32 rows, for
// which the operands of keys come from L2 once.
inline int64_t short_tile_rows(const Problem& p, int64_t tiles) {
  constexpr int64_t kScores = 8192, kFewestRows = 32;
  return p.tile_rows(std::max(kFewestRows, kScores / (tiles * round_up(p.keys, 16))), 4);
}

// Lanes of a row's partial maxima or sums.
template <int kWidth>
constexpr int kPartLanes = kWidth < 8 ? 8 : kWidth;

// A row's partial maxima or sums in two vectors, to kPartLanes floats.
template <int kWidth, bool kSum>
FASTGEN_HOST_DEVICE void store_part(Partials<kWidth, kSum>& partial, float* part) {
  if constexpr (kWidth < 8) {
    vector_at<kWidth>(part) = partial.even, vector_at<kWidth>(part + kWidth) = partial.odd;
  } else {
    partial.add(partial.even, partial.odd);
    vector_at<kWidth>(part) = partial.even;
  }
}

// Maxima or sums of rows from their parts (rows, kPartLanes), eight rows at a time: that takes fewer steps than the
// sum of each. Reads and writes a multiple of 8 rows.
template <int kWidth, bool kSum>
FASTGEN_HOST_DEVICE void reduce_rows(const float* parts, int64_t rows, float* results) {
  for (int64_t i = 0; i < rows; i += 8, parts += 8 * kPartLanes<kWidth>) {
    Vector<8> columns[8];
    if constexpr (kPartLanes<kWidth> > 8) {
      float halves[64];
      for (int r = 0; r < 8; ++r) {
        const Vector<8>&low = vector_at<8>(parts + r * kPartLanes<kWidth>), &high = *(&low + 1);
        vector_at<8>(halves + 8 * r) = kSum ? low + high : (high > low ? high : low);
      }
      load_columns<8>(halves, 8, columns);
    } else {
      load_columns<8>(parts, 8, columns);
    }
    FASTGEN_UNROLL
    for (int step = 4; step > 0; step /= 2) {
      FASTGEN_UNROLL
      for (int c = 0; c < step; ++c) {
        const Vector<8>&one = columns[c], &other = columns[c + step];
        columns[c] = kSum ? one + other : (other > one ? other : one);
      }
    }
    vector_at<8>(results + i) = columns[0];
  }
}

// Masks the scores of a row, except beyond the last key.
FASTGEN_HOST_DEVICE void mask_short_row(const Problem& p, int64_t batch, int64_t head, int64_t row, float* scores) {
  const int64_t from = p.first_key(row), to = std::max(from, p.end_key(row));
  if (p.mask) p.mask.apply(batch, head, row, from, to - from, scores + from);
  if (from > 0) std::fill_n(scores, from, -kInfinity);
  if (to < p.keys) std::fill(scores + to, scores + p.keys, -kInfinity);
}

// How a row's scores are masked while they are in registers. kAny: before, by mask_short_row.
enum class ShortMask { kNone, kAdded, kAllowed, kAny };

inline ShortMask short_mask_of(const Problem& p) {
  if (p.window_left >= 0 || p.window_right >= 0) return ShortMask::kAny;
  if (!p.mask) return ShortMask::kNone;
  if (p.mask.strides[3] == 0) return ShortMask::kAny;
  return p.mask.added != nullptr ? ShortMask::kAdded : ShortMask::kAllowed;
}

// 0, 1, 2, ...
template <int kWidth>
FASTGEN_HOST_DEVICE void count_lanes(Ints<kWidth>& lane) {
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
}

// The mask of one row: a score is kept where ``kept`` is not 0, and ``added`` is added to it. ``keys`` of them.
struct RowMask {
  const float* added = nullptr;
  const int32_t* kept = nullptr;  // whole vectors, with 0 beyond the last key
  int64_t keys;

  FASTGEN_HOST_DEVICE explicit RowMask(int64_t count) : keys(count) {}

  // Masks the scores from key ``from`` on, a vector of them; kLast: it may have fewer keys.
  template <int kWidth, ShortMask kMask, bool kLast>
  FASTGEN_HOST_DEVICE void apply(int64_t from, Vector<kWidth>& scores) const {
    constexpr int32_t kMinusInfinity = static_cast<int32_t>(0xff800000u);
    [[maybe_unused]] Ints<kWidth> lane;
    count_lanes<kWidth>(lane);
    if constexpr (kMask == ShortMask::kAllowed) {
      const Ints<kWidth> keep = *reinterpret_cast<const Unaligned<kWidth>*>(kept + from);
      scores = (Vector<kWidth>)(((Ints<kWidth>)scores & keep) | (~keep & kMinusInfinity));
    } else if constexpr (kMask == ShortMask::kAdded && !kLast) {
      scores += vector_at<kWidth>(added + from);
    } else if constexpr (kMask == ShortMask::kAdded) {
      Vector<kWidth> tail = {};
      if (keys >= kWidth) {  // the last whole vector, shifted: nothing is read beyond the row
#if defined(__clang__)
        for (int i = 0; i < kWidth; ++i) tail[i] = i < keys - from ? added[from + i] : 0.0f;
#else
        const int32_t shift = static_cast<int32_t>(from + kWidth - keys);
        tail = __builtin_shuffle(vector_at<kWidth>(added + keys - kWidth), lane + shift);
#endif
      } else {
        for (int64_t i = from; i < keys; ++i) tail[i - from] = added[i];
      }
      scores += tail;
    }
    if constexpr (kLast && kMask != ShortMask::kAllowed) {
      scores = lane < static_cast<int32_t>(keys - from) ? scores : -kInfinity - Vector<kWidth>{};
    }
  }

 private:
  template <int kWidth>
  using Unaligned __attribute__((vector_size(kWidth * sizeof(int32_t)), aligned(4), may_alias)) = int32_t;
};

// A boolean mask's row as 0 and -1, with 0 in whole vectors beyond the last key.
FASTGEN_HOST_DEVICE void read_kept(const Problem& p, int64_t batch, int64_t head, int64_t row,
                                   int32_t* __restrict__ kept) {
  const int64_t* strides = p.mask.strides;
  const uint8_t* __restrict__ allowed =
      reinterpret_cast<const uint8_t*>(p.mask.allowed + batch * strides[0] + head * strides[1] + row * strides[2]);
  for (int64_t j = 0; j < p.keys; ++j) kept[j] = allowed[j] != 0 ? -1 : 0;
  std::fill(kept + p.keys, kept + round_up(p.keys, 16), 0);
}

// Whether ``count`` values, whole vectors, are finite, and so small that sums of their products do not overflow.
template <int kWidth>
FASTGEN_HOST_DEVICE bool all_moderate(const float* data, int64_t count) {
  constexpr float kLargest = 0x1p60f, kFactor = 0x1p127f / kLargest * 2.0f;  // larger ones times it are infinite
  Sums<kWidth> zeros(0.0f);
  for (int64_t i = 0; i < count; i += 2 * kWidth) {
    zeros.add(zeros.even, vector_at<kWidth>(data + i) * kFactor * 0.0f);
    zeros.add(zeros.odd, vector_at<kWidth>(data + i + kWidth) * kFactor * 0.0f);
  }
  return zeros.result() == 0.0f;
}

// Whether a query of the heads of a group attends to a key, as far as windows and masks say.
inline bool is_used(const Problem& p, int64_t batch, int64_t key_head, int64_t key) {
  const int64_t groups = p.heads / p.key_heads, *strides = p.mask.strides;
  for (int64_t head = key_head * groups; head < (key_head + 1) * groups; ++head) {
    for (int64_t row = 0; row < p.queries; ++row) {
      if (key < p.first_key(row) || key >= p.end_key(row)) continue;
      const int64_t at = batch * strides[0] + head * strides[1] + row * strides[2] + key * strides[3];
      if (p.mask.allowed != nullptr ? p.mask.allowed[at] : p.mask.added == nullptr || p.mask.added[at] != -kInfinity) {
        return true;
      }
    }
  }
  return false;
}

// Keys and values of a head as products read them, in Panels. Memory is zero before the first head.
//
// Where masks or windows hide a key from every query, whatever it holds is ignored: a weight of zero times NaN is NaN,
// and a large number may overflow, so these become zeros if there is anything but moderate numbers.
template <int kWidth, int kGroup>
struct ShortKeys {
  using Product = Products<kWidth, kGroup>;
  static constexpr int kPanel = Product::kPanel;
  float* keys_across;                     // (Dk, M), times scale
  float* values = nullptr;                // (M, Dv), in the forward pass
  float *values_across = nullptr, *keys;  // (Dv, M) and (M, Dk), in the backward pass

  FASTGEN_HOST_DEVICE void take(const Problem& p, bool backward, Cutter& cut) {
    keys_across = cut.take(round_up(p.keys, kPanel) * p.key_dim);
    if (backward) {
      values_across = cut.take(round_up(p.keys, kPanel) * p.value_dim);
      keys = cut.take(Product::panels_size(p.keys, p.key_dim));
    } else {
      values = cut.take(Product::panels_size(p.keys, p.value_dim));
    }
  }

  FASTGEN_HOST_DEVICE void load(const Problem& p, int64_t batch, int64_t key_head) const {
    using Short = ShortProducts<kWidth, kGroup>;
    const float *key = p.key.at(batch, key_head, 0), *value = p.value.at(batch, key_head, 0);
    Product::pack_transposed(key, p.key.strides[2], p.keys, p.key_dim, p.scale, keys_across, p.key_dim * kPanel);
    if (values != nullptr) {
      Short::pack_rows(value, p.value.strides[2], p.keys, p.value_dim, values, p.keys);
    } else {
      Product::pack_transposed(value, p.value.strides[2], p.keys, p.value_dim, 1.0f, values_across,
                               p.value_dim * kPanel);
      Short::pack_rows(key, p.key.strides[2], p.keys, p.key_dim, keys, p.keys);
    }
    if (!p.mask && p.window_left < 0 && p.window_right < 0) return;
    const int64_t padded = round_up(p.keys, kPanel);
    if (all_moderate<kWidth>(keys_across, padded * p.key_dim) &&
        (values != nullptr ? all_moderate<kWidth>(values, Product::panels_size(p.keys, p.value_dim))
                           : all_moderate<kWidth>(values_across, padded * p.value_dim))) {
      return;
    }
    for (int64_t key_index = 0; key_index < p.keys; ++key_index) {
      if (is_used(p, batch, key_head, key_index)) continue;
      zero_column(keys_across, p.key_dim, key_index);
      if (values != nullptr) zero_row(values, p.keys, p.value_dim, key_index);
      if (values_across != nullptr) {
        zero_column(values_across, p.value_dim, key_index), zero_row(keys, p.keys, p.key_dim, key_index);
      }
    }
  }

 private:
  static void zero_column(float* panels, int64_t rows, int64_t column) {
    float* const panel = panels + column / kPanel * rows * kPanel + column % kPanel;
    for (int64_t i = 0; i < rows; ++i) panel[i * kPanel] = 0.0f;
  }
  static void zero_row(float* panels, int64_t rows, int64_t dim, int64_t row) {
    for (int64_t d = 0; d < dim; d += kPanel, panels += rows * kPanel) std::fill_n(panels + row * kPanel, kPanel, 0.0f);
  }
};

}  // namespace fastgen::cpu
