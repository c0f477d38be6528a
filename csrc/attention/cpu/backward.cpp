// dQ, dK, dV from the logsumexp, parallel over (key head, part): a part is every parts-th block of kTile keys.
//
//   prepare     lse and delta = rowsum(dO * O) - dlse of each row
//   for each block of keys of the part           dK and dV are accumulated in the workspace
//     for each block of kTile query rows
//       scores      S = Q K^T, dP = dO V^T
//       softmax     P = e^(S - lse), dS = P (dP - delta)
//       accumulate  dV += P^T dO, dK += dS^T Q, dQ[part] += dS K
//   epilogue    dQ = scale * sum of dQ[part], in a fixed order
//
// All five products use one register-tiled routine (multiply_group); the tiles stay in L2.
#include "attention/cpu/backward.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <memory>

#include "attention/cpu/forward.h"
#include "common/cpu/levels.h"
#include "common/cpu/sums.h"
#include "common/cpu/vector.h"
#include "common/math.h"

namespace fastgen::cpu {
namespace {

constexpr int kTile = 96;       // query rows and keys of a tile
constexpr int kWidest = 16;     // floats per AVX-512 vector
constexpr int kManyTasks = 32;  // parallelism that is enough for a large machine
constexpr int kManySums = 128;  // bounds the memory of the (N, Dk) partial sums
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A row stride of an odd number of cache lines spreads a column over all cache sets.
constexpr int kKeyRow = kMaxKeyDim + 16, kValueRow = kMaxValueDim + 16, kTileRow = kTile + 16;
static_assert(kKeyRow / 16 % 2 == 1 && kValueRow / 16 % 2 == 1 && kTileRow / 16 % 2 == 1, "an odd number of lines");

struct Workspace {
  // One block of keys.
  alignas(64) float keys[kTile][kKeyRow];
  alignas(64) float keys_across[kMaxKeyDim][kTileRow], values_across[kMaxValueDim][kTileRow];  // transposed
  alignas(64) float grad_keys[kTile][kKeyRow], grad_values[kTile][kValueRow];
  // One block of queries.
  alignas(64) float queries[kTile][kKeyRow];  // times scale
  alignas(64) float grad_out[kTile][kValueRow];
  // One tile of scores: S, then P; dP, then dS.
  alignas(64) float weights[kTile][kTileRow], grad_scores[kTile][kTileRow];
};

// State shared by all tasks. rows: queries padded to whole tiles; width: key_dim padded to whole vectors.
struct Shared {
  const AttentionBackwardParams& p;
  float *lse, *delta;   // (B, H, rows)
  float* grad_queries;  // (B, H, parts, rows, width), not yet times scale
  int64_t rows, width, parts;

  float* grad_queries_of(int64_t batch, int64_t head, int64_t part) const {
    return grad_queries + ((batch * p.heads + head) * parts + part) * rows * width;
  }
};

FASTGEN_HOST_DEVICE int64_t round_up(int64_t count, int64_t step) { return ceil_div(count, step) * step; }

// c[i][j] = (kAdd ? c[i][j] : 0) + sum over k of a[i * kARow + k * kAStep] * b[k][j], for kGroup rows and kVectors
// vectors. Rows of b are kBRow apart.
template <int kWidth, int kGroup, int kVectors, int kARow, int kAStep, int kBRow, bool kAdd>
FASTGEN_HOST_DEVICE void multiply_group(const float* __restrict__ a, const float* __restrict__ b, int64_t steps,
                                        float* __restrict__ c, int64_t c_row) {
  Vector<kWidth> sums[kGroup][kVectors] = {};
  for (int64_t k = 0; k < steps; ++k) {
    Vector<kWidth> row[kVectors];
    FASTGEN_UNROLL
    for (int v = 0; v < kVectors; ++v) row[v] = reinterpret_cast<const Vector<kWidth>*>(b + k * kBRow)[v];
    FASTGEN_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      const float factor = a[i * kARow + k * kAStep];
      FASTGEN_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[i][v] += factor * row[v];
    }
  }
  FASTGEN_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    FASTGEN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Vector<kWidth>& entry = reinterpret_cast<Vector<kWidth>*>(c + i * c_row)[v];
      entry = kAdd ? entry + sums[i][v] : sums[i][v];
    }
  }
}

// The same for any number of rows and columns, rounded up to whole groups and vectors. A column panel of b stays in L1
// while the rows of a are iterated.
template <int kWidth, int kGroup, int kARow, int kAStep, int kBRow, bool kAdd>
FASTGEN_HOST_DEVICE void multiply(const float* a, const float* b, int64_t rows, int64_t columns, int64_t steps,
                                  float* c, int64_t c_row) {
  int64_t j = 0;
  for (; j + kWidth < columns; j += 2 * kWidth) {
    for (int64_t i = 0; i < rows; i += kGroup) {
      multiply_group<kWidth, kGroup, 2, kARow, kAStep, kBRow, kAdd>(a + i * kARow, b + j, steps, c + i * c_row + j,
                                                                    c_row);
    }
  }
  if (j >= columns) return;
  for (int64_t i = 0; i < rows; i += kGroup) {
    multiply_group<kWidth, kGroup, 1, kARow, kAStep, kBRow, kAdd>(a + i * kARow, b + j, steps, c + i * c_row + j,
                                                                  c_row);
  }
}

// Copies (rows, dim) into rows of kRow, with zeros up to the next multiples of kGroup rows and kWidth columns.
template <int kWidth, int kGroup, int kRow>
FASTGEN_HOST_DEVICE void load(const float* from, int64_t stride, int64_t rows, int64_t dim, float factor, float* to) {
  const int64_t height = round_up(rows, kGroup), width = round_up(dim, kWidth);
  for (int64_t i = 0; i < height; ++i) {
    float* __restrict__ row = to + i * kRow;
    const float* __restrict__ source = from + i * stride;
    if (i < rows) {
      for (int64_t c = 0; c < dim; ++c) row[c] = source[c] * factor;
    }
    for (int64_t c = i < rows ? dim : 0; c < width; ++c) row[c] = 0.0f;
  }
}

// Copies (rows, dim) transposed, with zeros up to a multiple of kStep columns. Eight rows at a time, so that one cache
// line of each stays in L1.
template <int kStep>
FASTGEN_HOST_DEVICE void load_across(const float* from, int64_t stride, int64_t rows, int64_t dim,
                                     float (*to)[kTileRow]) {
  const int64_t width = round_up(rows, kStep);
  for (int64_t first = 0; first < width; first += 8) {
    for (int64_t c = 0; c < dim; ++c) {
      for (int64_t i = first; i < first + 8; ++i) to[c][i] = i < rows ? from[i * stride + c] : 0.0f;
    }
  }
}

// P = e^(S - lse) and dS = P (dP - delta) in place, for kCount columns starting at ``column``. Row i attends to the
// first
// ``keys`` keys of the tile, up to key i + ahead.
template <int kCount>
FASTGEN_HOST_DEVICE void softmax_tile(Workspace& w, int64_t rows, int64_t keys, int64_t column, int64_t ahead,
                                      const float* lse, const float* delta) {
  for (int64_t i = 0; i < rows; ++i) {
    float* __restrict__ weights = &w.weights[i][column];
    float* __restrict__ grads = &w.grad_scores[i][column];
    const float row_lse = lse[i], row_delta = delta[i];
    const int32_t visible = static_cast<int32_t>(std::min(keys, i + ahead + 1) - column);
    for (int32_t j = 0; j < kCount; ++j) {
      const float weight = exp_float(weights[j] - row_lse);
      const float grad = weight * (grads[j] - row_delta);
      weights[j] = j < visible ? weight : 0.0f;
      grads[j] = j < visible ? grad : 0.0f;
    }
  }
}

// One tile: query rows starting at ``first``, and the block of keys in the workspace.
template <int kWidth, int kGroup>
FASTGEN_HOST_DEVICE void run_tile(const Shared& shared, Workspace& w, int64_t batch, int64_t head, int64_t part,
                                  int64_t first, int64_t start, int64_t keys) {
  const AttentionBackwardParams& p = shared.p;
  const int64_t rows = std::min<int64_t>(kTile, p.queries - first);
  const float* query = p.query + batch * p.query_strides[0] + head * p.query_strides[1] + first * p.query_strides[2];
  const float* grad_out =
      p.grad_out + batch * p.grad_out_strides[0] + head * p.grad_out_strides[1] + first * p.grad_out_strides[2];
  load<kWidth, kGroup, kKeyRow>(query, p.query_strides[2], rows, p.key_dim, p.scale, w.queries[0]);
  load<kWidth, kGroup, kValueRow>(grad_out, p.grad_out_strides[2], rows, p.value_dim, 1.0f, w.grad_out[0]);
  const int64_t row = (batch * p.heads + head) * shared.rows + first;
  const int64_t ahead = p.is_causal ? first - start : kTile;
  for (int64_t j = 0; j < keys; j += 2 * kWidth) {
    multiply<kWidth, kGroup, kKeyRow, 1, kTileRow, false>(w.queries[0], &w.keys_across[0][j], rows, 2 * kWidth,
                                                          p.key_dim, &w.weights[0][j], kTileRow);
    multiply<kWidth, kGroup, kValueRow, 1, kTileRow, false>(w.grad_out[0], &w.values_across[0][j], rows, 2 * kWidth,
                                                            p.value_dim, &w.grad_scores[0][j], kTileRow);
    softmax_tile<2 * kWidth>(w, rows, keys, j, ahead, shared.lse + row, shared.delta + row);
  }
  multiply<kWidth, kGroup, 1, kTileRow, kValueRow, true>(w.weights[0], w.grad_out[0], keys, p.value_dim, rows,
                                                         w.grad_values[0], kValueRow);
  multiply<kWidth, kGroup, 1, kTileRow, kKeyRow, true>(w.grad_scores[0], w.queries[0], keys, p.key_dim, rows,
                                                       w.grad_keys[0], kKeyRow);
  multiply<kWidth, kGroup, kTileRow, 1, kKeyRow, true>(w.grad_scores[0], w.keys[0], rows, p.key_dim, keys,
                                                       shared.grad_queries_of(batch, head, part) + first * shared.width,
                                                       shared.width);
}

FASTGEN_HOST_DEVICE void store(const float* __restrict__ from, int64_t row, int64_t rows, int64_t dim,
                               float* __restrict__ to, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < dim; ++c) to[i * stride + c] = from[i * row + c];
  }
}

// Blocks of keys part, part + parts, ... of one key head. The stride balances causal problems, in which earlier keys
// have more queries.
template <int kWidth, int kGroup>
FASTGEN_HOST_DEVICE void run_part(const Shared& shared, Workspace& w, int64_t batch, int64_t key_head, int64_t part) {
  const AttentionBackwardParams& p = shared.p;
  const int64_t groups = p.heads / p.key_heads;
  const float* key = p.key + batch * p.key_strides[0] + key_head * p.key_strides[1];
  const float* value = p.value + batch * p.value_strides[0] + key_head * p.value_strides[1];
  float* grad_key = p.grad_key + batch * p.grad_key_strides[0] + key_head * p.grad_key_strides[1];
  float* grad_value = p.grad_value + batch * p.grad_value_strides[0] + key_head * p.grad_value_strides[1];
  for (int64_t head = key_head * groups; head < (key_head + 1) * groups; ++head) {
    std::fill_n(shared.grad_queries_of(batch, head, part), shared.rows * shared.width, 0.0f);
  }
  for (int64_t start = part * kTile; start < p.keys; start += shared.parts * kTile) {
    const int64_t keys = std::min<int64_t>(kTile, p.keys - start);
    load<kWidth, kGroup, kKeyRow>(key + start * p.key_strides[2], p.key_strides[2], keys, p.key_dim, 1.0f, w.keys[0]);
    load_across<2 * kWidth>(key + start * p.key_strides[2], p.key_strides[2], keys, p.key_dim, w.keys_across);
    load_across<2 * kWidth>(value + start * p.value_strides[2], p.value_strides[2], keys, p.value_dim, w.values_across);
    for (int64_t j = 0; j < round_up(keys, kGroup); ++j) {
      std::fill_n(w.grad_keys[j], round_up(p.key_dim, kWidth), 0.0f);
      std::fill_n(w.grad_values[j], p.value_dim, 0.0f);
    }
    for (int64_t head = key_head * groups; head < (key_head + 1) * groups; ++head) {
      for (int64_t first = p.is_causal ? start : 0; first < p.queries; first += kTile) {
        run_tile<kWidth, kGroup>(shared, w, batch, head, part, first, start, keys);
      }
    }
    store(w.grad_keys[0], kKeyRow, keys, p.key_dim, grad_key + start * p.grad_key_strides[2], p.grad_key_strides[2]);
    store(w.grad_values[0], kValueRow, keys, p.value_dim, grad_value + start * p.grad_value_strides[2],
          p.grad_value_strides[2]);
  }
}

// lse and delta = rowsum(dO * O) - dlse of one row. A fully masked row has lse -inf; +inf makes its weights 0.
FASTGEN_HOST_DEVICE void prepare_row(const Shared& shared, int64_t batch, int64_t head, int64_t row) {
  const AttentionBackwardParams& p = shared.p;
  const float* out = p.out + batch * p.out_strides[0] + head * p.out_strides[1] + row * p.out_strides[2];
  const float* grad =
      p.grad_out + batch * p.grad_out_strides[0] + head * p.grad_out_strides[1] + row * p.grad_out_strides[2];
  const float lse = p.lse[batch * p.lse_strides[0] + head * p.lse_strides[1] + row * p.lse_strides[2]];
  float delta = sum_row<16>(p.value_dim, [=](int64_t c) { return grad[c] * out[c]; });
  if (p.grad_lse != nullptr) {
    delta -= p.grad_lse[batch * p.grad_lse_strides[0] + head * p.grad_lse_strides[1] + row * p.grad_lse_strides[2]];
  }
  const int64_t at = (batch * p.heads + head) * shared.rows + row;
  shared.lse[at] = lse == -kInfinity ? kInfinity : lse;
  shared.delta[at] = delta;
}

void store_grad_query_row(const Shared& shared, int64_t batch, int64_t head, int64_t row) {
  const AttentionBackwardParams& p = shared.p;
  float* out =
      p.grad_query + batch * p.grad_query_strides[0] + head * p.grad_query_strides[1] + row * p.grad_query_strides[2];
  for (int64_t c = 0; c < p.key_dim; ++c) {
    float sum = 0.0f;
    for (int64_t part = 0; part < shared.parts; ++part) {
      sum += shared.grad_queries_of(batch, head, part)[row * shared.width + c];
    }
    out[c] = sum * p.scale;
  }
}

template <typename Work>
void for_each_row(const AttentionBackwardParams& p, Work work) {
  constexpr int64_t kGrain = 256;
  torch::stable::parallel_for(0, p.batch * p.heads * p.queries, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      work(row / p.queries / p.heads, row / p.queries % p.heads, row % p.queries);
    }
  });
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p) {
  // Register tiles: 12 x 2 accumulators use 24 of 32 registers (AVX-512, NEON), 6 x 2 use 12 of 16.
  const auto run = for_level<run_part<4, kGenericRegisters * 3 / 8>, run_part<8, 6>, run_part<16, 12>>();
  const auto prepare = for_level<prepare_row>();
  const int64_t heads = p.batch * p.heads, key_heads = p.batch * p.key_heads, rows = round_up(p.queries, kTile);
  if (key_heads == 0) return;
  const int64_t width = round_up(p.key_dim, kWidest);
  const int64_t parts = std::min(
      {ceil_div(kManyTasks, key_heads), ceil_div(kManySums, std::max<int64_t>(heads, 1)), ceil_div(p.keys, kTile)});
  const std::unique_ptr<float[]> of_rows(new float[2 * heads * rows]);
  const std::unique_ptr<float[]> grad_queries(new float[heads * parts * rows * width]);
  const Shared shared{p, of_rows.get(), of_rows.get() + heads * rows, grad_queries.get(), rows, width, parts};
  for_each_row(p, [&](int64_t batch, int64_t head, int64_t row) { prepare(shared, batch, head, row); });
  torch::stable::parallel_for(0, key_heads * parts, 1, [&](int64_t begin, int64_t end) {
    static thread_local Workspace workspace;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / parts;
      run(shared, workspace, head / p.key_heads, head % p.key_heads, item % parts);
    }
  });
  for_each_row(p, [&](int64_t batch, int64_t head, int64_t row) { store_grad_query_row(shared, batch, head, row); });
}

}  // namespace fastgen::cpu
