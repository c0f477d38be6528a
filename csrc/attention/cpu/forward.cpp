// out = softmax(scale Q K^T) V with online softmax (Milakov and Gimelshein, 2018), parallel over (key head, part): a
// part is every parts-th tile of the head's query rows.
//
//   K^T and V in Panels
//   for each tile of kRows query rows
//     for each kBlocks blocks of kTile keys
//       scores      S = Q K^T, for each block
//       softmax     P = e^(S - max) for each row; rescales O
//       accumulate  O += P V, for each block
//     epilogue: O / sum(P), lse
#include "attention/cpu/forward.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "attention/cpu/key_sums.h"
#include "attention/cpu/memory.h"
#include "attention/cpu/products.h"
#include "attention/cpu/rows.h"
#include "attention/cpu/short.h"
#include "common/cpu/levels.h"
#include "common/math.h"

namespace fastgen::cpu {
namespace {

constexpr int64_t kRows = 72;   // of a tile
constexpr int64_t kBlocks = 2;  // blocks of scores at a time; with kRows, they take 63 KiB

struct Shared {
  const ForwardParams& p;
  int64_t rows, tiles, parts;  // of queries: rows of a tile, tiles of a head; parts of a key head
  int64_t padded_keys;         // whole blocks
};

// Memory of one thread.
template <int kWidth, int kGroup>
struct Workspace {
  using Product = Products<kWidth, kGroup>;
  float *keys_across, *values, *queries;  // K^T and V in Panels, Q in Groups
  float* out;                             // in Panels
  float* scores;                          // (kBlocks, rows, kTileRow)
  float *row_max, *row_sum, *keep;
  int64_t size;

  FASTGEN_HOST_DEVICE Workspace(const Shared& s, float* memory) {
    const Problem& p = s.p.problem;
    Cutter cut(memory);
    keys_across = cut.take(s.padded_keys * p.key_dim);
    values = cut.take(Product::panels_size(s.padded_keys, p.value_dim));
    queries = cut.take(s.rows * p.key_dim), out = cut.take(Product::panels_size(s.rows, p.value_dim));
    scores = cut.take(kBlocks * s.rows * kTileRow);
    row_max = cut.take(s.rows), row_sum = cut.take(s.rows), keep = cut.take(kBlocks * kTile);
    size = cut.used();
  }
};

// Blocks of scores of one row, ``stride`` apart.
struct RowOfScores {
  float* scores;
  const float* keep;  // null: no dropout
  int64_t blocks, stride, last_width;

  FASTGEN_HOST_DEVICE int64_t width(int64_t block) const { return block + 1 < blocks ? kTile : last_width; }
};

// Whether a score is NaN, where one is infinite.
FASTGEN_HOST_DEVICE bool has_nan(const RowOfScores& t) {
  bool found = false;
  for (int64_t b = 0; b < t.blocks; ++b) {
    for (int64_t j = 0; j < t.width(b); ++j) found |= t.scores[b * t.stride + j] != t.scores[b * t.stride + j];
  }
  return found;
}

// Online softmax: replaces scores by e^(score - row_max), without dropped ones; returns the factor that rescales
// earlier sums.
template <int kWidth, bool kKeep>
FASTGEN_HOST_DEVICE float softmax_row(const RowOfScores& t, float& row_max, float& row_sum) {
  Maxima<kWidth> maxima(row_max);
  for (int64_t b = 0; b < t.blocks; ++b) {
    const float* scores = t.scores + b * t.stride;
    for (int64_t j = 0; j < t.width(b); j += 2 * kWidth) {
      maxima.add(maxima.even, vector_at<kWidth>(scores + j));
      maxima.add(maxima.odd, vector_at<kWidth>(scores + j + kWidth));
    }
  }
  float new_max = maxima.result();
  // The maximum ignores NaN. It becomes NaN beside an infinite one: the row's logsumexp is NaN then, and else infinite.
  if (new_max == kInfinity && (has_nan(t) || (row_max != kInfinity && row_sum != row_sum))) new_max = kNan;
  const float shift = new_max == -kInfinity ? 0.0f : new_max;  // -inf - -inf is NaN
  Sums<kWidth> sums(0.0f);
  for (int64_t b = 0; b < t.blocks; ++b) {
    float* scores = t.scores + b * t.stride;
    [[maybe_unused]] const float* keep = kKeep ? t.keep + b * kTile : nullptr;
    for (int64_t j = 0; j < t.width(b); j += 2 * kWidth) {
      Vector<kWidth> even = vector_at<kWidth>(scores + j) - shift, odd = vector_at<kWidth>(scores + j + kWidth) - shift;
      exp_of_weight<kWidth>(even), exp_of_weight<kWidth>(odd);
      sums.add(sums.even, even), sums.add(sums.odd, odd);
      if constexpr (kKeep) even *= vector_at<kWidth>(keep + j), odd *= vector_at<kWidth>(keep + j + kWidth);
      vector_at<kWidth>(scores + j) = even, vector_at<kWidth>(scores + j + kWidth) = odd;
    }
  }
  const float factor = row_max == new_max ? 1.0f : exp_float(row_max - shift);
  row_sum = row_sum * factor + sums.result(), row_max = new_max;
  return factor;
}

// Multiplies row i of Panels.
template <int kPanel>
FASTGEN_HOST_DEVICE void scale_row(float* panels, int64_t padded, int64_t i, int64_t dim, float factor) {
  for (int64_t d = 0; d < dim; d += kPanel, panels += padded * kPanel) {
    for (int c = 0; c < kPanel; ++c) panels[i * kPanel + c] *= factor;
  }
}

template <int kWidth, int kGroup>
FASTGEN_HOST_DEVICE void run_tile(const Shared& s, const Workspace<kWidth, kGroup>& w, int64_t batch, int64_t head,
                                  int64_t first) {
  using Product = Products<kWidth, kGroup>;
  constexpr int kPanel = Product::kPanel;
  const Problem& p = s.p.problem;
  const int64_t rows = std::min(s.rows, p.queries - first), padded = round_up(rows, kGroup);
  const int64_t stride = s.rows * kTileRow, all = s.padded_keys * kPanel;
  Product::pack_groups(p.query.at(batch, head, first), p.query.strides[2], rows, padded, p.key_dim, p.scale, w.queries,
                       p.key_dim * kGroup);
  std::fill_n(w.out, Product::panels_size(padded, p.value_dim), 0.0f);
  std::fill_n(w.row_max, rows, -kInfinity), std::fill_n(w.row_sum, rows, 0.0f);
  const int64_t last_block = ceil_div(p.end_key(first + rows - 1), kTile);
  for (int64_t begin = p.first_key(first) / kTile; begin < last_block; begin += kBlocks) {
    const int64_t blocks = std::min(kBlocks, last_block - begin);
    const int64_t end_key = std::min(p.keys, (begin + blocks) * kTile),
                  last_keys = end_key - (begin + blocks - 1) * kTile;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t keys = b + 1 < blocks ? kTile : last_keys;
      Product::scores(w.queries, p.key_dim * kGroup, padded, w.keys_across + (begin + b) * kTile * p.key_dim,
                      p.key_dim * kPanel, keys, p.key_dim, w.scores + b * stride, begin + b + 1 < last_block);
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t b = 0; b < blocks; ++b) {
        p.mask_scores(batch, head, first + i, (begin + b) * kTile, w.scores + b * stride + i * kTileRow);
      }
      if (p.seeds != nullptr) {
        p.keep_row(batch, head, first + i, begin * kTile, end_key, w.keep);
        std::fill(w.keep + (end_key - begin * kTile), w.keep + blocks * kTile, 0.0f);
      }
      const RowOfScores row{w.scores + i * kTileRow, p.seeds == nullptr ? nullptr : w.keep, blocks, stride,
                            written_width(last_keys)};
      const float factor = row.keep == nullptr ? softmax_row<kWidth, false>(row, w.row_max[i], w.row_sum[i])
                                               : softmax_row<kWidth, true>(row, w.row_max[i], w.row_sum[i]);
      if (factor != 1.0f) scale_row<kPanel>(w.out, padded, i, p.value_dim, factor);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      float* scores = w.scores + b * stride;
      std::fill(scores + rows * kTileRow, scores + padded * kTileRow, 0.0f);
      Product::add_product(scores, padded, b + 1 < blocks ? kTile : last_keys, w.values + (begin + b) * kTile * kPanel,
                           all, p.value_dim, w.out, padded * kPanel, begin + b + 1 < last_block);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const bool empty = w.row_sum[i] == 0.0f;
    scale_row<kPanel>(w.out, padded, i, p.value_dim, empty ? 0.0f : 1.0f / w.row_sum[i]);
    *s.p.lse.at(batch, head, first + i) = empty                       ? -kInfinity
                                          : w.row_max[i] == kInfinity ? kInfinity
                                                                      : w.row_max[i] + std::log(w.row_sum[i]);
  }
  Product::unpack_panels(w.out, padded, rows, p.value_dim, 1.0f, s.p.out.at(batch, head, first), s.p.out.strides[2]);
}

template <int kWidth, int kGroup>
FASTGEN_HOST_DEVICE int64_t workspace_size(const Shared& s) {
  return Workspace<kWidth, kGroup>(s, nullptr).size;
}

// ``load``: the memory does not hold the operands of these keys, which the parts of a head have in common.
template <int kWidth, int kGroup>
FASTGEN_HOST_DEVICE void run_part(const Shared& s, float* memory, bool load, int64_t batch, int64_t key_head,
                                  int64_t part) {
  using Product = Products<kWidth, kGroup>;
  const Problem& p = s.p.problem;
  const Workspace<kWidth, kGroup> w(s, memory);
  if (load) {
    Product::pack_transposed(p.key.at(batch, key_head, 0), p.key.strides[2], p.keys, p.key_dim, 1.0f, w.keys_across,
                             p.key_dim * Product::kPanel);
    Product::pack_panels(p.value.at(batch, key_head, 0), p.value.strides[2], p.keys, p.keys, s.padded_keys, p.value_dim,
                         1.0f, w.values);
  }
  const int64_t groups = p.heads / p.key_heads;
  for (int64_t item = part; item < groups * s.tiles; item += s.parts) {
    run_tile<kWidth, kGroup>(s, w, batch, key_head * groups + item / s.tiles, item % s.tiles * s.rows);
  }
}

}  // namespace

void attention_forward(const ForwardParams& params) {
  const Problem& p = params.problem;
  if (has_short_forward(p)) return short_attention_forward(params);
  Shared s{params, p.tile_rows(kRows, kRowStep), 0, 0, round_up(p.keys, kTile)};
  s.tiles = ceil_div(p.queries, s.rows), s.parts = parts_of(p, p.heads / p.key_heads * s.tiles);
  const auto part = for_level<run_part<4, kGenericGroup>, run_part<8, 6>, run_part<16, 12>>();
  const int64_t workspace =
      for_level<workspace_size<4, kGenericGroup>, workspace_size<8, 6>, workspace_size<16, 12>>()(s);
  torch::stable::parallel_for(0, p.batch * p.key_heads * s.parts, 1, [&](int64_t begin, int64_t end) {
    const Memory memory = allocate(workspace);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / s.parts;
      const bool load = item == begin || item % s.parts == 0;
      part(s, memory.get(), load, head / p.key_heads, head % p.key_heads, item % s.parts);
    }
  });
}

}  // namespace fastgen::cpu
