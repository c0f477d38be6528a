// out = softmax(scale Q K^T) V with online softmax (Milakov and Gimelshein, 2018), parallel over (head, kRows query
// rows):
//
//   for each block of kKeys keys            keys transposed into L1, values read in place
//     for each group of kGroupRows rows
//       scores      S = Q K^T               one row at a time, vectors along the keys
//       softmax     P = e^(S - max)         returns the factor that rescales the running sums
//       accumulate  O = O * factor + P V    kGroupRows x kVectors register tile; values are reused from L1
//   epilogue: O / sum(P), lse
#include "attention/cpu/forward.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

#include "common/cpu/levels.h"
#include "common/cpu/vector.h"
#include "common/math.h"

namespace fastgen::cpu {
namespace {

constexpr int kRows = 96;
constexpr int kKeys = 128;
constexpr int kGroupRows = 6;  // rows that share each load of a value
static_assert(kRows % kGroupRows == 0, "a task is whole row groups");
constexpr float kNone = -std::numeric_limits<float>::infinity();

template <int kWidth>
using Lanes __attribute__((vector_size(kWidth * sizeof(int32_t)))) = int32_t;

// Butterfly reduction over the lanes of a vector: log2(kWidth) steps.
template <int kWidth, typename Combine>
FASTGEN_HOST_DEVICE float fold_lanes(Vector<kWidth> value, Combine combine) {
  Lanes<kWidth> lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
#pragma GCC unroll 8
  for (int step = kWidth / 2; step > 0; step /= 2) {
#if defined(__clang__)
    Vector<kWidth> other;
    for (int i = 0; i < kWidth; ++i) other[i] = value[lane[i] ^ step];
#else
    const Vector<kWidth> other = __builtin_shuffle(value, lane ^ step);
#endif
    value = combine(value, other);
  }
  return value[0];
}

// Workspace of one thread: about 50 KiB at value_dim 64.
struct Workspace {
  alignas(64) float query[kRows][kMaxKeyDim];  // times scale
  alignas(64) float keys[kMaxKeyDim][kKeys];   // transposed; zeros beyond the last key
  alignas(64) float weights[kGroupRows][kKeys];
  alignas(64) float out[kRows][kMaxValueDim];
  float row_max[kRows], row_sum[kRows];
};

// scores = query . keys, for one row and a block of keys.
template <int kWidth>
FASTGEN_HOST_DEVICE void score_row(const float* query, const Workspace& w, int64_t key_dim, float* scores) {
  constexpr int kVectors = 128 / kWidth < 8 ? 128 / kWidth : 8;
  for (int first = 0; first < kKeys; first += kVectors * kWidth) {
    Vector<kWidth> sums[kVectors] = {};
    for (int64_t d = 0; d < key_dim; ++d) {
      const Vector<kWidth>* keys = reinterpret_cast<const Vector<kWidth>*>(&w.keys[d][first]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[v] += query[d] * keys[v];
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) reinterpret_cast<Vector<kWidth>*>(scores + first)[v] = sums[v];
  }
}

// Online softmax of one row: replaces scores by e^(score - row_max); returns the factor that rescales earlier sums.
template <int kWidth>
FASTGEN_HOST_DEVICE float softmax_row(float* scores, float& row_max, float& row_sum) {
  Vector<kWidth> maxima = row_max - Vector<kWidth>{};
  for (int j = 0; j < kKeys; j += kWidth) {
    const Vector<kWidth> part = *reinterpret_cast<const Vector<kWidth>*>(scores + j);
    maxima = part > maxima ? part : maxima;
  }
  const auto larger = [](Vector<kWidth> a, Vector<kWidth> b) { return a > b ? a : b; };
  const float new_max = fold_lanes<kWidth>(maxima, larger);
  for (int j = 0; j < kKeys; ++j) scores[j] = exp_float(scores[j] - new_max);
  Vector<kWidth> sums = {};
  for (int j = 0; j < kKeys; j += kWidth) sums += *reinterpret_cast<const Vector<kWidth>*>(scores + j);
  const auto plus = [](Vector<kWidth> a, Vector<kWidth> b) { return a + b; };
  const float factor = exp_float(row_max - new_max);
  row_sum = row_sum * factor + fold_lanes<kWidth>(sums, plus);
  row_max = new_max;
  return factor;
}

// out[row] = out[row] * factor[row] + weights[row] . values, for kGroupRows rows and kVectors * kWidth columns.
template <int kWidth, int kVectors>
FASTGEN_HOST_DEVICE void accumulate(Workspace& w, int first_row, int64_t col, const float* value, int64_t value_stride,
                                    int64_t keys, const float* factor) {
  Vector<kWidth> sums[kGroupRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kGroupRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = *reinterpret_cast<const Vector<kWidth>*>(&w.out[first_row + r][col + v * kWidth]) * factor[r];
    }
  }
  for (int64_t j = 0; j < keys; ++j) {
    Vector<kWidth> values[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      values[v] = *reinterpret_cast<const Vector<kWidth>*>(value + j * value_stride + col + v * kWidth);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kGroupRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] += w.weights[r][j] * values[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kGroupRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      *reinterpret_cast<Vector<kWidth>*>(&w.out[first_row + r][col + v * kWidth]) = sums[r][v];
    }
  }
}

// The last key that a query row attends to.
FASTGEN_HOST_DEVICE int64_t last_key(const AttentionParams& p, int64_t row) {
  return p.is_causal ? std::min(row, p.keys - 1) : p.keys - 1;
}

// kWidth: floats per vector. kVectors * kWidth output columns are accumulated in one pass over the keys.
template <int kWidth, int kVectors>
FASTGEN_HOST_DEVICE void run_task(const AttentionParams& p, Workspace& w, int64_t batch, int64_t head, int64_t first) {
  const int64_t rows = std::min<int64_t>(kRows, p.queries - first), key_head = head / (p.heads / p.key_heads);
  const float* query = p.query + batch * p.query_strides[0] + head * p.query_strides[1] + first * p.query_strides[2];
  const float* key = p.key + batch * p.key_strides[0] + key_head * p.key_strides[1];
  const float* value = p.value + batch * p.value_strides[0] + key_head * p.value_strides[1];
  for (int64_t r = 0; r < kRows; ++r) {
    w.row_max[r] = kNone, w.row_sum[r] = 0.0f;
    for (int64_t c = 0; c < p.value_dim; ++c) w.out[r][c] = 0.0f;
    // Rows past the end are zeros and are not stored.
    for (int64_t d = 0; d < p.key_dim; ++d)
      w.query[r][d] = r < rows ? query[r * p.query_strides[2] + d] * p.scale : 0.0f;
  }
  for (int64_t start = 0; start <= last_key(p, first + rows - 1); start += kKeys) {
    const int64_t keys = std::min<int64_t>(kKeys, p.keys - start);
    for (int64_t d = 0; d < p.key_dim; ++d) {
      for (int64_t j = 0; j < keys; ++j) w.keys[d][j] = key[(start + j) * p.key_strides[2] + d];
      for (int64_t j = keys; j < kKeys; ++j) w.keys[d][j] = 0.0f;
    }
    for (int group = 0; group < rows; group += kGroupRows) {
      float factor[kGroupRows];
      for (int r = 0; r < kGroupRows; ++r) {
        const int64_t row = first + group + r;
        score_row<kWidth>(w.query[group + r], w, p.key_dim, w.weights[r]);
        for (int64_t j = std::max<int64_t>(0, last_key(p, row) + 1 - start); j < kKeys; ++j) w.weights[r][j] = kNone;
        factor[r] = softmax_row<kWidth>(w.weights[r], w.row_max[group + r], w.row_sum[group + r]);
      }
      int64_t col = 0;
      for (; col + kVectors * kWidth <= p.value_dim; col += kVectors * kWidth) {
        accumulate<kWidth, kVectors>(w, group, col, value + start * p.value_strides[2], p.value_strides[2], keys,
                                     factor);
      }
      for (; col < p.value_dim; col += kWidth) {
        accumulate<kWidth, 1>(w, group, col, value + start * p.value_strides[2], p.value_strides[2], keys, factor);
      }
    }
  }
  float* out = p.out + batch * p.out_strides[0] + head * p.out_strides[1] + first * p.out_strides[2];
  float* lse = p.lse + (batch * p.queries + first) * p.heads + head;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < p.value_dim; ++c) out[r * p.out_strides[2] + c] = w.out[r][c] / w.row_sum[r];
    lse[r * p.heads] = w.row_max[r] + log_float(w.row_sum[r]);
  }
}

}  // namespace

void attention_forward(const AttentionParams& p) {
  // Register tiles: 6 x 4 accumulators use 24 of 32 registers (AVX-512, NEON), 6 x 2 use 12 of 16.
  const auto task = for_level<run_task<4, kGenericRegisters / 8>, run_task<8, 2>, run_task<16, 4>>();
  const int64_t blocks = ceil_div(p.queries, kRows);
  torch::stable::parallel_for(0, p.batch * p.heads * blocks, 1, [&](int64_t begin, int64_t end) {
    static thread_local Workspace workspace;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / blocks;
      task(p, workspace, head / p.heads, head % p.heads, item % blocks * kRows);
    }
  });
}

}  // namespace fastgen::cpu
