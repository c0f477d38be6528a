// out = softmax(scale Q K^T) V with few keys, parallel over (key head, part): see forward.cpp.
//
//   scale K^T and V in Panels
//   for each tile of query rows
//     Q in Panels
//     scores      S = Q (scale K^T), whole rows
//     softmax     P = e^(S - max) for each row
//     accumulate  O = P V
//     epilogue    O / sum(P), lse
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "attention/cpu/short.h"
#include "common/cpu/levels.h"
#include "common/math.h"

namespace fastgen::cpu {
namespace {

struct Shared {
  const ForwardParams& p;
  int64_t rows, tiles, parts;  // of queries: rows of a tile, tiles of a head; parts of a key head
  ShortMask mask;
};

// Memory of one thread.
template <int kWidth, int kGroup>
struct Workspace {
  using Product = Products<kWidth, kGroup>;
  ShortKeys<kWidth, kGroup> keys;
  float *queries, *out;                     // in Panels
  float* scores;                            // (rows, kScoreRow)
  float *parts, *tops, *sums, *lse, *keep;  // (rows, kPartLanes), and for each row
  int32_t* kept;
  int64_t size;

  FASTGEN_HOST_DEVICE Workspace(const Shared& s, float* memory) {
    const Problem& p = s.p.problem;
    Cutter cut(memory);
    keys.take(p, false, cut);
    queries = cut.take(Product::panels_size(s.rows, p.key_dim));
    out = cut.take(Product::panels_size(s.rows, p.value_dim));
    scores = cut.take(s.rows * kScoreRow);
    const int64_t rows = round_up(s.rows, 8);
    parts = cut.take(rows * kPartLanes<kWidth>), tops = cut.take(rows), sums = cut.take(rows);
    lse = cut.take(rows), keep = cut.take(kScoreRow);
    kept = cut.take_of<int32_t>(kScoreRow);
    size = cut.used();
  }
};

// Masks the scores of a row, those beyond the last key of its last vector too, and returns parts of their maximum,
// which ignores NaN.
template <int kWidth, ShortMask kMask>
FASTGEN_HOST_DEVICE void max_row(const RowMask& mask, float* scores, float* part) {
  Maxima<kWidth> maxima(-kInfinity);
  const int64_t last = (mask.keys - 1) / kWidth * kWidth;
  int64_t j = 0;
  for (; j + kWidth < last; j += 2 * kWidth) {
    Vector<kWidth>&even = vector_at<kWidth>(scores + j), &odd = vector_at<kWidth>(scores + j + kWidth);
    mask.apply<kWidth, kMask, false>(j, even), mask.apply<kWidth, kMask, false>(j + kWidth, odd);
    maxima.add(maxima.even, even), maxima.add(maxima.odd, odd);
  }
  if (j < last) {
    Vector<kWidth>& even = vector_at<kWidth>(scores + j);
    mask.apply<kWidth, kMask, false>(j, even);
    maxima.add(maxima.even, even);
  }
  Vector<kWidth>& odd = vector_at<kWidth>(scores + last);
  mask.apply<kWidth, kMask, true>(last, odd);
  maxima.add(maxima.odd, odd);
  store_part(maxima, part);
}

template <int kWidth, ShortMask kMask, int kGroup>
FASTGEN_HOST_DEVICE void max_rows(const Shared& s, const Workspace<kWidth, kGroup>& w, int64_t batch, int64_t head,
                                  int64_t first, int64_t rows) {
  const Problem& p = s.p.problem;
  RowMask mask(p.keys);
  mask.kept = w.kept;
  for (int64_t i = 0; i < rows; ++i) {
    float* const scores = w.scores + i * kScoreRow;
    if constexpr (kMask == ShortMask::kAny) mask_short_row(p, batch, head, first + i, scores);
    if constexpr (kMask == ShortMask::kAdded) mask.added = p.mask.row(batch, head, first + i);
    if constexpr (kMask == ShortMask::kAllowed) {
      if (i == 0 || p.mask.strides[2] != 0) read_kept(p, batch, head, first + i, w.kept);
    }
    max_row<kWidth, kMask>(mask, scores, w.parts + i * kPartLanes<kWidth>);
  }
}

// Replaces scores by e^(score - shift), without dropped ones, and returns parts of their sum.
template <int kWidth, bool kKeep>
FASTGEN_HOST_DEVICE void exp_row(int64_t keys, float shift, const float* keep, float* scores, float* part) {
  Sums<kWidth> sums(0.0f);
  for (int64_t j = 0; j < keys; j += kWidth) {
    Vector<kWidth> weight = vector_at<kWidth>(scores + j) - shift;
    exp_of_weight<kWidth>(weight);
    sums.add(sums.even, weight);
    if constexpr (kKeep) weight *= vector_at<kWidth>(keep + j);
    vector_at<kWidth>(scores + j) = weight;
  }
  store_part(sums, part);
}

// Replaces the scores of rows by e^(score - max), without dropped ones; w.sums: 1 / their sum, w.lse.
template <int kWidth, int kGroup>
FASTGEN_HOST_DEVICE void softmax(const Shared& s, const Workspace<kWidth, kGroup>& w, int64_t batch, int64_t head,
                                 int64_t first, int64_t rows) {
  const Problem& p = s.p.problem;
  switch (s.mask) {
    case ShortMask::kNone: max_rows<kWidth, ShortMask::kNone, kGroup>(s, w, batch, head, first, rows); break;
    case ShortMask::kAdded: max_rows<kWidth, ShortMask::kAdded, kGroup>(s, w, batch, head, first, rows); break;
    case ShortMask::kAllowed: max_rows<kWidth, ShortMask::kAllowed, kGroup>(s, w, batch, head, first, rows); break;
    default: max_rows<kWidth, ShortMask::kAny, kGroup>(s, w, batch, head, first, rows);
  }
  reduce_rows<kWidth, false>(w.parts, rows, w.tops);
  bool infinite = false;
  for (int64_t i = 0; i < rows; ++i) {
    infinite |= w.tops[i] == kInfinity;
    w.lse[i] = w.tops[i] = w.tops[i] == -kInfinity ? 0.0f : w.tops[i];  // -inf - -inf is NaN
  }
  if (infinite) {  // the logsumexp is infinite, but NaN beside a NaN
    for (int64_t i = 0; i < rows; ++i) {
      const float* scores = w.scores + i * kScoreRow;
      if (std::any_of(scores, scores + p.keys, [](float x) { return x != x; })) w.lse[i] = kNan;
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    float *scores = w.scores + i * kScoreRow, *part = w.parts + i * kPartLanes<kWidth>;
    if (p.seeds != nullptr) {
      p.keep_row(batch, head, first + i, 0, p.keys, w.keep);
      exp_row<kWidth, true>(p.keys, w.tops[i], w.keep, scores, part);
    } else {
      exp_row<kWidth, false>(p.keys, w.tops[i], nullptr, scores, part);
    }
  }
  reduce_rows<kWidth, true>(w.parts, rows, w.sums);
  for (int64_t i = 0; i < rows; ++i) {
    const float sum = w.sums[i], log = sum == sum ? log_float(sum) : sum;
    w.lse[i] = sum == 0.0f ? -kInfinity : w.lse[i] == kInfinity ? kInfinity : w.lse[i] + log;
    w.sums[i] = sum == 0.0f ? 0.0f : 1.0f / sum;
  }
  float* const lse = s.p.lse.at(batch, head, first);
  for (int64_t i = 0; i < rows; ++i) lse[i * s.p.lse.strides[2]] = w.lse[i];
}

template <int kWidth, int kGroup>
FASTGEN_HOST_DEVICE void run_part(const Shared& s, float* memory, bool load, int64_t batch, int64_t key_head,
                                  int64_t part) {
  using Product = Products<kWidth, kGroup>;
  using Short = ShortProducts<kWidth, kGroup>;
  constexpr int kPanel = Product::kPanel;
  const Problem& p = s.p.problem;
  const Workspace<kWidth, kGroup> w(s, memory);
  if (load) w.keys.load(p, batch, key_head);
  const int64_t groups = p.heads / p.key_heads;
  for (int64_t item = part; item < groups * s.tiles; item += s.parts) {
    const int64_t head = key_head * groups + item / s.tiles, first = item % s.tiles * s.rows;
    const int64_t rows = std::min(s.rows, p.queries - first);
    Short::pack_rows(p.query.at(batch, head, first), p.query.strides[2], rows, p.key_dim, w.queries, s.rows);
    Short::template product<typename Short::InPanels, kScoreRow, false>(
        w.queries, s.rows * kPanel, rows, w.keys.keys_across, p.key_dim * kPanel, p.key_dim, p.keys, w.scores, kPanel);
    softmax<kWidth, kGroup>(s, w, batch, head, first, rows);
    Short::template product<typename Short::InScores, kPanel, false>(w.scores, 0, rows, w.keys.values, p.keys * kPanel,
                                                                     p.keys, p.value_dim, w.out, s.rows * kPanel);
    Short::store_rows(w.out, s.rows, rows, p.value_dim, w.sums, 1.0f, s.p.out.at(batch, head, first),
                      s.p.out.strides[2]);
  }
}

template <int kWidth, int kGroup>
FASTGEN_HOST_DEVICE int64_t workspace_size(const Shared& s) {
  return Workspace<kWidth, kGroup>(s, nullptr).size;
}

}  // namespace

void short_attention_forward(const ForwardParams& params) {
  const Problem& p = params.problem;
  const int64_t rows = short_tile_rows(p, 1), tiles = ceil_div(p.queries, rows);
  const Shared s{params, rows, tiles, parts_of(p, p.heads / p.key_heads * tiles), short_mask_of(p)};
  const auto part = for_level<run_part<4, kGenericGroup>, run_part<8, 6>, run_part<16, 12>>();
  const int64_t workspace =
      for_level<workspace_size<4, kGenericGroup>, workspace_size<8, 6>, workspace_size<16, 12>>()(s);
  torch::stable::parallel_for(0, p.batch * p.key_heads * s.parts, 1, [&](int64_t begin, int64_t end) {
    const Memory memory = allocate(workspace);
    std::fill_n(memory.get(), workspace, 0.0f);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / s.parts;
      const bool load = item == begin || item % s.parts == 0;
      part(s, memory.get(), load, head / p.key_heads, head % p.key_heads, item % s.parts);
    }
  });
}

}  // namespace fastgen::cpu
