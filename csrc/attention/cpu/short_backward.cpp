// dQ, dK, dV with few keys, from the logsumexp; parallel over key heads.
//
//   scale K^T, V^T and K in Panels; dK = dV = 0
//   for each tile of query rows               delta = rowsum(dO * O) - dlse
//     Q and dO in Panels
//     scores      S = Q (scale K^T), dP = dO V^T, whole rows
//     softmax     P = e^(S - lse), dS = P (dP - delta)
//     accumulate  dV += P^T dO, dK += dS^T Q
//     epilogue    dQ = scale dS K
//   epilogue: scale dK, dV
//
// The gradient of a mask is a sum over the batch, or the heads, where the mask is broadcast: heads that share it are
// one task. Batches are divided among a few tasks, each with a sum of its own, which are added in a fixed order.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "attention/cpu/short.h"
#include "common/cpu/levels.h"
#include "common/math.h"

namespace fastgen::cpu {
namespace {

// A float mask that moves all scores of a row far from 0 leaves its logsumexp too few digits: it is computed again.
constexpr float kCoarseLse = 256.0f;

struct Shared {
  const BackwardParams& p;
  int64_t rows;  // of a tile
  ShortMask mask;
};

// Memory of one thread.
template <int kWidth, int kGroup>
struct Workspace {
  using Product = Products<kWidth, kGroup>;
  ShortKeys<kWidth, kGroup> keys;
  float *grad_keys, *grad_values;            // in Panels
  float *queries, *grad_out, *grad_queries;  // rows of a tile, in Panels
  float *weights, *grad_scores;              // (rows, kScoreRow): S, then P; dP, then dS
  float* keep;
  int32_t* kept;
  int64_t size;

  FASTGEN_HOST_DEVICE Workspace(const Shared& s, float* memory) {
    const Problem& p = s.p.problem;
    Cutter cut(memory);
    keys.take(p, true, cut);
    grad_keys = cut.take(Product::panels_size(p.keys, p.key_dim));
    grad_values = cut.take(Product::panels_size(p.keys, p.value_dim));
    queries = cut.take(Product::panels_size(s.rows, p.key_dim));
    grad_out = cut.take(Product::panels_size(s.rows, p.value_dim));
    grad_queries = cut.take(Product::panels_size(s.rows, p.key_dim));
    weights = cut.take(s.rows * kScoreRow), grad_scores = cut.take(s.rows * kScoreRow);
    keep = cut.take(kScoreRow), kept = cut.take_of<int32_t>(kScoreRow);
    size = cut.used();
  }
};

// Masks the scores of a row and moves the largest to 0; returns the logsumexp of what they are then.
FASTGEN_HOST_DEVICE float recenter(const Problem& p, int64_t batch, int64_t head, int64_t row, float* scores) {
  mask_short_row(p, batch, head, row, scores);
  float top = -kInfinity, sum = 0.0f;
  for (int64_t j = 0; j < p.keys; ++j) top = scores[j] > top ? scores[j] : top;
  top = top == -kInfinity ? 0.0f : top;
  for (int64_t j = 0; j < p.keys; ++j) sum += exp_float(scores[j] -= top);
  return sum == 0.0f ? kInfinity : std::log(sum);
}

// P = e^(S - lse) and dS = P (dP - delta) in place; P without dropped weights.
template <int kWidth, ShortMask kMask, bool kKeep, bool kLast>
FASTGEN_HOST_DEVICE void softmax_vector(const RowMask& mask, float lse, float delta, const float* keep, int64_t j,
                                        float* weights, float* grads) {
  Vector<kWidth> weight = vector_at<kWidth>(weights + j), grad = vector_at<kWidth>(grads + j);
  mask.apply<kWidth, kMask, kLast>(j, weight);
  weight -= lse;
  exp_of_weight<kWidth>(weight);
  if constexpr (kKeep) {
    const Vector<kWidth> factor = vector_at<kWidth>(keep + j);
    vector_at<kWidth>(weights + j) = weight * factor;
    grad *= factor;
  } else {
    vector_at<kWidth>(weights + j) = weight;
  }
  vector_at<kWidth>(grads + j) = weight * (grad - delta);
}

template <int kWidth, ShortMask kMask, bool kKeep>
FASTGEN_HOST_DEVICE void softmax_row(const RowMask& mask, float lse, float delta, const float* keep, float* weights,
                                     float* grads) {
  const int64_t last = (mask.keys - 1) / kWidth * kWidth;
  for (int64_t j = 0; j < last; j += kWidth) {
    softmax_vector<kWidth, kMask, kKeep, false>(mask, lse, delta, keep, j, weights, grads);
  }
  softmax_vector<kWidth, kMask, kKeep, true>(mask, lse, delta, keep, last, weights, grads);
}

template <int kWidth, int kGroup, ShortMask kMask>
FASTGEN_HOST_DEVICE void softmax_rows(const Shared& s, const Workspace<kWidth, kGroup>& w, int64_t batch, int64_t head,
                                      int64_t first, int64_t rows, float* grad_masks) {
  const Problem& p = s.p.problem;
  RowMask mask(p.keys);
  mask.kept = w.kept;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = first + i;
    float *weights = w.weights + i * kScoreRow, *grads = w.grad_scores + i * kScoreRow;
    float lse = row_lse(s.p.lse, batch, head, row);
    const float delta = row_delta(p, s.p.grad_out, s.p.out, s.p.grad_lse, batch, head, row);
    if constexpr (kMask == ShortMask::kAdded) mask.added = p.mask.row(batch, head, row);
    if constexpr (kMask == ShortMask::kAllowed) {
      if (i == 0 || p.mask.strides[2] != 0) read_kept(p, batch, head, row, w.kept);
    }
    const bool coarse = p.mask.added != nullptr && std::abs(lse) > kCoarseLse && std::abs(lse) < kInfinity;
    if (coarse) {
      lse = recenter(p, batch, head, row, weights);
    } else if constexpr (kMask == ShortMask::kAny) {
      mask_short_row(p, batch, head, row, weights);
    }
    if (p.seeds != nullptr) {
      p.keep_row(batch, head, row, 0, p.keys, w.keep);
      if (coarse) {
        softmax_row<kWidth, ShortMask::kNone, true>(mask, lse, delta, w.keep, weights, grads);
      } else {
        softmax_row<kWidth, kMask, true>(mask, lse, delta, w.keep, weights, grads);
      }
    } else if (coarse) {
      softmax_row<kWidth, ShortMask::kNone, false>(mask, lse, delta, nullptr, weights, grads);
    } else {
      softmax_row<kWidth, kMask, false>(mask, lse, delta, nullptr, weights, grads);
    }
    if (grad_masks == nullptr) continue;
    float* __restrict__ grad_mask =
        grad_masks + batch * s.p.grad_mask_strides[0] + head * s.p.grad_mask_strides[1] + row * p.keys;
    for (int64_t j = 0; j < p.keys; ++j) grad_mask[j] += grads[j];
  }
}

template <int kWidth, int kGroup>
FASTGEN_HOST_DEVICE void run_tile(const Shared& s, const Workspace<kWidth, kGroup>& w, int64_t batch, int64_t head,
                                  int64_t first, float* grad_masks) {
  using Short = ShortProducts<kWidth, kGroup>;
  using InPanels = typename Short::InPanels;
  using InScores = typename Short::InScores;
  using InScoresAcross = typename Short::InScoresAcross;
  constexpr int kPanel = Short::kPanel;
  const Problem& p = s.p.problem;
  const int64_t rows = std::min(s.rows, p.queries - first), tall = s.rows * kPanel, all = p.keys * kPanel;
  const Operand &query = p.query, &grad = s.p.grad_out;
  Short::pack_rows(query.at(batch, head, first), query.strides[2], rows, p.key_dim, w.queries, s.rows);
  Short::pack_rows(grad.at(batch, head, first), grad.strides[2], rows, p.value_dim, w.grad_out, s.rows);
  Short::template product<InPanels, kScoreRow, false>(w.queries, tall, rows, w.keys.keys_across, p.key_dim * kPanel,
                                                      p.key_dim, p.keys, w.weights, kPanel);
  Short::template product<InPanels, kScoreRow, false>(w.grad_out, tall, rows, w.keys.values_across,
                                                      p.value_dim * kPanel, p.value_dim, p.keys, w.grad_scores, kPanel);
  switch (s.mask) {
    case ShortMask::kNone:
      softmax_rows<kWidth, kGroup, ShortMask::kNone>(s, w, batch, head, first, rows, grad_masks);
      break;
    case ShortMask::kAdded:
      softmax_rows<kWidth, kGroup, ShortMask::kAdded>(s, w, batch, head, first, rows, grad_masks);
      break;
    case ShortMask::kAllowed:
      softmax_rows<kWidth, kGroup, ShortMask::kAllowed>(s, w, batch, head, first, rows, grad_masks);
      break;
    default: softmax_rows<kWidth, kGroup, ShortMask::kAny>(s, w, batch, head, first, rows, grad_masks);
  }
  Short::template product<InScoresAcross, kPanel, true>(w.weights, 0, p.keys, w.grad_out, tall, rows, p.value_dim,
                                                        w.grad_values, all);
  Short::template product<InScoresAcross, kPanel, true>(w.grad_scores, 0, p.keys, w.queries, tall, rows, p.key_dim,
                                                        w.grad_keys, all);
  Short::template product<InScores, kPanel, false>(w.grad_scores, 0, rows, w.keys.keys, all, p.keys, p.key_dim,
                                                   w.grad_queries, tall);
  Short::store_rows(w.grad_queries, s.rows, rows, p.key_dim, nullptr, p.scale, s.p.grad_query.at(batch, head, first),
                    s.p.grad_query.strides[2]);
}

template <int kWidth, int kGroup>
FASTGEN_HOST_DEVICE void run_head(const Shared& s, float* memory, float* grad_masks, int64_t batch, int64_t key_head) {
  using Product = Products<kWidth, kGroup>;
  using Short = ShortProducts<kWidth, kGroup>;
  const Problem& p = s.p.problem;
  const Workspace<kWidth, kGroup> w(s, memory);
  w.keys.load(p, batch, key_head);
  std::fill_n(w.grad_keys, Product::panels_size(p.keys, p.key_dim), 0.0f);
  std::fill_n(w.grad_values, Product::panels_size(p.keys, p.value_dim), 0.0f);
  const int64_t groups = p.heads / p.key_heads, tiles = ceil_div(p.queries, s.rows);
  for (int64_t item = 0; item < groups * tiles; ++item) {
    run_tile<kWidth, kGroup>(s, w, batch, key_head * groups + item / tiles, item % tiles * s.rows, grad_masks);
  }
  Short::store_rows(w.grad_keys, p.keys, p.keys, p.key_dim, nullptr, p.scale, s.p.grad_key.at(batch, key_head, 0),
                    s.p.grad_key.strides[2]);
  Short::store_rows(w.grad_values, p.keys, p.keys, p.value_dim, nullptr, 1.0f, s.p.grad_value.at(batch, key_head, 0),
                    s.p.grad_value.strides[2]);
}

template <int kWidth, int kGroup>
FASTGEN_HOST_DEVICE int64_t workspace_size(const Shared& s) {
  return Workspace<kWidth, kGroup>(s, nullptr).size;
}

}  // namespace

void short_attention_backward(const BackwardParams& params) {
  const Problem& p = params.problem;
  const Shared s{params, short_tile_rows(p, 2), short_mask_of(p)};
  const auto head = for_level<run_head<4, kGenericGroup>, run_head<8, 6>, run_head<16, 12>>();
  const int64_t workspace =
      for_level<workspace_size<4, kGenericGroup>, workspace_size<8, 6>, workspace_size<16, 12>>()(s);
  const bool mask_grad = params.grad_mask != nullptr;
  const bool shared_batch = mask_grad && params.grad_mask_strides[0] == 0;
  const int64_t heads = mask_grad && params.grad_mask_strides[1] == 0 ? p.key_heads : 1;  // of a task
  const int64_t head_tasks = p.key_heads / heads;
  const int64_t sums = shared_batch ? std::min(p.batch, ceil_div(kManyTasks, head_tasks)) : p.batch;
  const int64_t batches = ceil_div(p.batch, std::max<int64_t>(1, sums));  // of a task
  const int64_t mask_size = shared_batch ? (params.grad_mask_strides[1] == 0 ? 1 : p.heads) * p.queries * p.keys : 0;
  const int64_t more = shared_batch ? std::max<int64_t>(1, sums) - 1 : 0;  // sums beside that in the gradient
  const Memory more_sums = allocate(std::max<int64_t>(1, more * mask_size));
  std::fill_n(more_sums.get(), more * mask_size, 0.0f);
  torch::stable::parallel_for(0, sums * head_tasks, 1, [&](int64_t begin, int64_t end) {
    const Memory memory = allocate(workspace);
    std::fill_n(memory.get(), workspace, 0.0f);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sum = item / head_tasks, first = item % head_tasks * heads;
      float* const grad_masks = shared_batch && sum > 0 ? more_sums.get() + (sum - 1) * mask_size : params.grad_mask;
      for (int64_t batch = sum * batches; batch < std::min(p.batch, (sum + 1) * batches); ++batch) {
        for (int64_t i = 0; i < heads; ++i) head(s, memory.get(), grad_masks, batch, first + i);
      }
    }
  });
  for (int64_t sum = 0; sum < more; ++sum) {
    const float* __restrict__ other = more_sums.get() + sum * mask_size;
    float* __restrict__ grad = params.grad_mask;
    for (int64_t i = 0; i < mask_size; ++i) grad[i] += other[i];
  }
}

}  // namespace fastgen::cpu
