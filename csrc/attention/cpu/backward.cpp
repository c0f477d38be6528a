// dQ, dK, dV from the logsumexp, parallel over (key head, part): a part is every parts-th tile of the head's query
// rows.
//
//   K^T, V^T and K in Panels; gradients of the part's keys = 0
//   for each tile of kRows query rows         delta = rowsum(dO * O) - dlse
//     for each block of kTile keys
//       scores      S = Q K^T, dP = dO V^T
//       softmax     P = e^(S - lse), dS = P (dP - delta)
//       accumulate  dV += P^T dO, dK += dS^T Q, dQ += dS K
//   epilogue: dK, dV = sums over the parts, in a fixed order
//
// The gradient of a mask is added up in place: tasks that would write the same of it run one after another.
#include "attention/cpu/backward.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "attention/cpu/key_sums.h"
#include "attention/cpu/memory.h"
#include "attention/cpu/products.h"
#include "attention/cpu/rows.h"
#include "attention/cpu/short.h"
#include "common/cpu/levels.h"
#include "common/math.h"

namespace fastgen::cpu {
namespace {

constexpr int64_t kRows = 96;  // of a tile

struct Shared {
  const BackwardParams& p;
  const KeySums& sums;
  int64_t rows, tiles, parts;  // of queries: rows of a tile, tiles of a head; parts of a key head
};

// Memory of one thread.
template <int kWidth, int kGroup>
struct Workspace {
  using Product = Products<kWidth, kGroup>;
  float *keys_across, *values_across, *keys;               // in Panels
  float *query_groups, *grad_groups, *queries, *grad_out;  // rows of a tile in Groups, and in Panels
  float* grad_queries;                                     // in Panels
  float *weights, *grad_scores;                            // S, then P; dP, then dS
  float *lse, *delta, *keep;
  int64_t size;

  FASTGEN_HOST_DEVICE Workspace(const Shared& s, float* memory) {
    const Problem& p = s.p.problem;
    const int64_t key = Product::panels_size(1, p.key_dim), value = Product::panels_size(1, p.value_dim);
    Cutter cut(memory);
    keys_across = cut.take(s.sums.padded_keys * p.key_dim), values_across = cut.take(s.sums.padded_keys * p.value_dim);
    keys = cut.take(s.sums.padded_keys * key);
    query_groups = cut.take(s.rows * p.key_dim), grad_groups = cut.take(s.rows * p.value_dim);
    queries = cut.take(s.rows * key), grad_out = cut.take(s.rows * value), grad_queries = cut.take(s.rows * key);
    weights = cut.take(s.rows * kTileRow), grad_scores = cut.take(s.rows * kTileRow);
    lse = cut.take(s.rows), delta = cut.take(s.rows), keep = cut.take(kTile);
    size = cut.used();
  }
};

// P = e^(S - lse) and dS = P (dP - delta) in place; P without dropped weights.
template <int kWidth, bool kKeep>
FASTGEN_HOST_DEVICE void softmax_row(int64_t width, float lse, float delta, const float* keep, float* weights,
                                     float* grads) {
  for (int64_t j = 0; j < width; j += kWidth) {
    Vector<kWidth> weight = vector_at<kWidth>(weights + j) - lse, grad = vector_at<kWidth>(grads + j);
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
}

template <int kWidth, int kGroup>
struct TileOfRows {
  using Product = Products<kWidth, kGroup>;
  static constexpr int kPanel = Product::kPanel;
  const Shared& s;
  const Workspace<kWidth, kGroup>& w;
  int64_t batch, head, first, rows, padded;

  FASTGEN_HOST_DEVICE TileOfRows(const Shared& shared, const Workspace<kWidth, kGroup>& workspace, int64_t b, int64_t h,
                                 int64_t start)
      : s(shared), w(workspace), batch(b), head(h), first(start) {
    rows = std::min(s.rows, problem().queries - first), padded = round_up(rows, kGroup);
  }

  FASTGEN_HOST_DEVICE const Problem& problem() const { return s.p.problem; }

  FASTGEN_HOST_DEVICE void load() const {
    const Problem& p = problem();
    const Operand &query = p.query, &grad = s.p.grad_out;
    const float *queries = query.at(batch, head, first), *grads = grad.at(batch, head, first);
    Product::pack_groups(queries, query.strides[2], rows, padded, p.key_dim, p.scale, w.query_groups,
                         p.key_dim * kGroup);
    Product::pack_panels(queries, query.strides[2], rows, padded, padded, p.key_dim, p.scale, w.queries);
    Product::pack_groups(grads, grad.strides[2], rows, padded, p.value_dim, 1.0f, w.grad_groups, p.value_dim * kGroup);
    Product::pack_panels(grads, grad.strides[2], rows, padded, padded, p.value_dim, 1.0f, w.grad_out);
    std::fill_n(w.grad_queries, Product::panels_size(padded, p.key_dim), 0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      w.lse[i] = row_lse(s.p.lse, batch, head, first + i);
      w.delta[i] = row_delta(p, s.p.grad_out, s.p.out, s.p.grad_lse, batch, head, first + i);
    }
  }

  FASTGEN_HOST_DEVICE void softmax(int64_t key, int64_t keys) const {
    const Problem& p = problem();
    const int64_t width = written_width(keys);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = first + i;
      float *weights = w.weights + i * kTileRow, *grads = w.grad_scores + i * kTileRow;
      p.mask_scores(batch, head, row, key, weights);
      if (keys < kTile) std::fill(grads + keys, grads + kTile, 0.0f);
      if (p.seeds != nullptr) {
        p.keep_row(batch, head, row, key, key + keys, w.keep);
        std::fill(w.keep + keys, w.keep + kTile, 0.0f);
        softmax_row<kWidth, true>(width, w.lse[i], w.delta[i], w.keep, weights, grads);
      } else {
        softmax_row<kWidth, false>(width, w.lse[i], w.delta[i], nullptr, weights, grads);
      }
      if (s.p.grad_mask == nullptr) continue;
      float* __restrict__ grad_mask =
          s.p.grad_mask + batch * s.p.grad_mask_strides[0] + head * s.p.grad_mask_strides[1] + row * p.keys + key;
      for (int64_t j = 0; j < keys; ++j) grad_mask[j] += grads[j];
    }
    std::fill(w.weights + rows * kTileRow, w.weights + padded * kTileRow, 0.0f);  // rows past the end
    std::fill(w.grad_scores + rows * kTileRow, w.grad_scores + padded * kTileRow, 0.0f);
  }

  FASTGEN_HOST_DEVICE void run(float* grad_keys, float* grad_values) const {
    const Problem& p = problem();
    const int64_t all = s.sums.padded_keys * kPanel, tall = padded * kPanel, dim = p.key_dim, wide = p.value_dim;
    load();
    const int64_t end = p.end_key(first + rows - 1);
    for (int64_t key = p.first_key(first) / kTile * kTile; key < end; key += kTile) {
      const int64_t keys = std::min<int64_t>(kTile, p.keys - key);
      const bool ahead = key + kTile < end;
      Product::scores(w.query_groups, dim * kGroup, padded, w.keys_across + key * dim, dim * kPanel, keys, dim,
                      w.weights, ahead);
      Product::scores(w.grad_groups, wide * kGroup, padded, w.values_across + key * wide, wide * kPanel, keys, wide,
                      w.grad_scores, ahead);
      softmax(key, keys);
      Product::add_transposed(w.weights, padded, keys, w.grad_out, tall, wide, grad_values + key * kPanel, all, ahead);
      Product::add_transposed(w.grad_scores, padded, keys, w.queries, tall, dim, grad_keys + key * kPanel, all, ahead);
      Product::add_product(w.grad_scores, padded, keys, w.keys + key * kPanel, all, dim, w.grad_queries, tall, ahead);
    }
    Product::unpack_panels(w.grad_queries, padded, rows, dim, p.scale, s.p.grad_query.at(batch, head, first),
                           s.p.grad_query.strides[2]);
  }
};

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
    const float *key = p.key.at(batch, key_head, 0), *value = p.value.at(batch, key_head, 0);
    Product::pack_transposed(key, p.key.strides[2], p.keys, p.key_dim, 1.0f, w.keys_across,
                             p.key_dim * Product::kPanel);
    Product::pack_transposed(value, p.value.strides[2], p.keys, p.value_dim, 1.0f, w.values_across,
                             p.value_dim * Product::kPanel);
    Product::pack_panels(key, p.key.strides[2], p.keys, p.keys, s.sums.padded_keys, p.key_dim, 1.0f, w.keys);
  }
  float* const grad_keys = s.sums.of(batch, key_head, part);
  float* const grad_values = grad_keys + Product::panels_size(s.sums.padded_keys, p.key_dim);
  std::fill_n(grad_keys, s.sums.size, 0.0f);
  const int64_t groups = p.heads / p.key_heads;
  for (int64_t tile = part; tile < s.tiles; tile += s.parts) {  // every head of the group: they may share a mask
    for (int64_t head = key_head * groups; head < (key_head + 1) * groups; ++head) {
      TileOfRows<kWidth, kGroup>(s, w, batch, head, tile * s.rows).run(grad_keys, grad_values);
    }
  }
}

template <int kWidth, int kGroup>
FASTGEN_HOST_DEVICE void store_keys(const Shared& s, int64_t batch, int64_t key_head, int64_t first, int64_t rows) {
  store_key_sums<Products<kWidth, kGroup>>(s.sums, s.p.problem, s.p.grad_key, s.p.grad_value, batch, key_head, first,
                                           rows);
}

}  // namespace

void attention_backward(const BackwardParams& params) {
  const Problem& p = params.problem;
  if (has_short_backward(p)) return short_attention_backward(params);
  const int64_t rows = p.tile_rows(kRows, kRowStep), tiles = ceil_div(p.queries, rows);
  const int64_t parts = parts_of(p, tiles), padded = round_up(p.keys, kTile);
  const KeySums sums(p, parts);
  const Shared s{params, sums, rows, tiles, parts};
  const auto part = for_level<run_part<4, kGenericGroup>, run_part<8, 6>, run_part<16, 12>>();
  const auto store = for_level<store_keys<4, kGenericGroup>, store_keys<8, 6>, store_keys<16, 12>>();
  const int64_t workspace =
      for_level<workspace_size<4, kGenericGroup>, workspace_size<8, 6>, workspace_size<16, 12>>()(s);
  // Batches and heads that share the gradient of a mask are one task.
  const bool mask_grad = params.grad_mask != nullptr;
  const int64_t batches = mask_grad && params.grad_mask_strides[0] == 0 ? p.batch : 1;
  const int64_t heads = mask_grad && params.grad_mask_strides[1] == 0 ? p.key_heads : 1;
  const int64_t head_tasks = p.key_heads / heads;
  torch::stable::parallel_for(
      0, p.batch / std::max<int64_t>(1, batches) * head_tasks * parts, 1, [&](int64_t begin, int64_t end) {
        const Memory memory = allocate(workspace);
        for (int64_t item = begin; item < end; ++item) {
          const int64_t batch = item / parts / head_tasks * batches, head = item / parts % head_tasks * heads;
          const bool load = item == begin || item % parts == 0 || batches * heads > 1;
          for (int64_t i = 0; i < batches * heads; ++i) {
            part(s, memory.get(), load, batch + i / heads, head + i % heads, item % parts);
          }
        }
      });
  const int64_t blocks = padded / kTile;
  torch::stable::parallel_for(0, p.batch * p.key_heads * blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / blocks, first = item % blocks * kTile;
      store(s, head / p.key_heads, head % p.key_heads, first, std::min<int64_t>(kTile, p.keys - first));
    }
  });
}

}  // namespace fastgen::cpu
