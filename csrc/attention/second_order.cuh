// Second-order backward, in O(N) memory: the gradients of <dO, out'> + <dlse, lse'> (tangent.cuh), which are the
// gradients of the first backward pass for incoming gradients Gq, Gk, Gv, Gb. Notation of backward.cuh and tangent.cuh,
// with C = dO Gv^T M and r = rowsum(dO * out'):
//
//   dS = P (dP - delta)      dS2 = (W - w) dS + P (C - r)      Pt = P (W - w) M
//
//   attention_second_order_query                      attention_second_order_key_value
//     load Q, Gq, dO;  delta, r                         load K, Gk, V, Gv
//     for each visible key tile                         for each visible query tile of each head of the group
//       load K, Gk, V, Gv                                 load Q, Gq, dO, lse, delta, w, r
//       S, W, dP, C                  scores               S^T, W^T, dP^T, C^T
//       dS, dS2                      softmax              dS^T, dS2^T, Pt^T
//       dQ += dS2 K + dS Gk          accumulate           dK += dS2^T Q + dS^T Gq, dV += Pt^T dO
//     dQ *= scale                    epilogue             dK *= scale
//
// With a softcap, dQ and dK take g dS and g dS2 + curvature dS instead of dS and dS2 (softcap.cuh).
//
// The gradients of dO and dlse are out' and lse'. Blocks and warps as in backward.cuh, one fragment of 16 rows per
// warp.
#pragma once

#include "attention/backward.cuh"
#include "attention/softcap.cuh"
#include "attention/tangent_tiles.cuh"

namespace fastgen::attention {

// Shared memory: the owned operands with their tangents, then the stages of the iterated ones.
template <typename T, int kKeyDim, int kValueDim>
struct SecondOrderLayout {
  static constexpr TileShape kShape = second_order_shape({kKeyDim, kValueDim}, sizeof(T));
  static_assert(kShape.fragments == 1, "a warp owns 16 rows");
  static constexpr int kThreads = 32 * kShape.warps;
  static constexpr int kMaxKeys = kShape.owned(kShape.warps);  // of a KeyBlock
  static constexpr int kKeyColumns = smaller(kKeyDim, kShape.columns);
  static constexpr int kValueColumns = smaller(kValueDim, kShape.columns);
  using Queries = QueryTangentTile<T, kKeyDim, kValueDim>;
  using Keys = KeyTangentTile<T, kKeyDim, kValueDim>;

  template <typename Owned>
  static __device__ __forceinline__ Owned owned() {
    return {device::dynamic_shared(), static_cast<int>(blockDim.x / 32) * kFragmentRows};
  }
  template <typename Owned, typename Iterated>
  static __device__ __forceinline__ Iterated iterated(int i) {
    const int stage = i * kShape.iterated * Iterated::kBytes;
    return {device::dynamic_shared() + owned<Owned>().rows * Owned::kBytes + stage, kShape.iterated};
  }
};

// One query row.
struct SecondOrderRow {
  float shift = INFINITY;  // from the logsumexp, see weight()
  float delta = 0.0f, mean = 0.0f, second_delta = 0.0f;
};

// The factors that do not contain P, and P: S, W, dP and C (after dropout) become P, W - w, dP - delta and C - r.
__device__ __forceinline__ void center(float& score, float factor, float& direction, float& grad, float& cross,
                                       const SecondOrderRow& row) {
  score = weight(score, factor, row.shift);
  direction -= row.mean, grad -= row.delta, cross -= row.second_delta;
}

// From these: score = P (W - w) = Pt before dropout, grad = dS, direction = dS2.
__device__ __forceinline__ void multiply(float& score, float& direction, float& grad, float cross) {
  grad *= score;
  const float second = direction * grad + score * cross;
  score *= direction;
  direction = second;
}

// The scores of a tile whose rows are queries: S, W, dP and C.
template <typename T, int kTiles>
struct SecondOrderTile {
  float scores[1][kTiles][4] = {}, direction[1][kTiles][4] = {}, grads[1][kTiles][4] = {}, cross[1][kTiles][4] = {};
  float factor;  // of mask_scores

  template <typename Queries, typename Keys>
  __device__ __forceinline__ SecondOrderTile(const SecondOrderParams& p, const Queries& queries, int warp_row,
                                             const Keys& keys, bool masked, Visible<1, kTiles>& visible,
                                             const HeadMask<T>& mask, const HeadMask<T>& mask_tangent, int row,
                                             int key) {
    const Problem& problem = p.first.problem;
    multiply_rows(scores, queries.query(), warp_row, keys.key(), problem.exact);
    multiply_direction(direction, queries, warp_row, keys, p.tangents, problem.exact);
    multiply_rows(grads, queries.grad_out(), warp_row, keys.value(), problem.exact);
    if (p.tangents.value.data != nullptr) {
      multiply_rows(cross, queries.grad_out(), warp_row, keys.tangent_value(), problem.exact);
    }
    float direction_scale;
    const float scale = cap_direction<false>(scores, direction, problem, direction_scale);
    factor = mask_scores<false, false>(scores, scale, masked, visible, mask, row, key);
    mask_direction<false>(direction, direction_scale, masked, visible, mask_tangent, row, key);
  }

  // grads = dS and direction = dS2.
  __device__ __forceinline__ void softmax(const Problem& problem, int64_t first_row, const SecondOrderRow (&rows)[2],
                                          bool masked, int row, int key) {
    if (problem.dropout.seeds != nullptr) {
      const auto kept = HeadDropout(problem, first_row).template kept<1, kTiles>(row, key);
      kept.apply(grads), kept.apply(cross);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        center(scores[0][tile][i], factor, direction[0][tile][i], grads[0][tile][i], cross[0][tile][i], rows[i / 2]);
      }
    }
    if (masked) {
      clear_where_zero(direction, scores), clear_where_zero(grads, scores), clear_where_zero(cross, scores);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        multiply(scores[0][tile][i], direction[0][tile][i], grads[0][tile][i], cross[0][tile][i]);
      }
    }
  }

  // After softmax: the gradients of the scores before the softcap. Overwrites scores and cross.
  template <typename Queries, typename Keys>
  __device__ __forceinline__ void uncap(const SecondOrderParams& p, const Queries& queries, int warp_row,
                                        const Keys& keys) {
    const Problem& problem = p.first.problem;
    if (!is_capped(problem)) return;
    clear(scores), clear(cross);
    multiply_rows<true>(scores, queries.query(), warp_row, keys.key(), problem.exact);
    multiply_direction<true>(cross, queries, warp_row, keys, p.tangents, problem.exact);
    cap_gradients(grads, direction, scores, cross, problem);
  }
};

// gridDim = (query tiles of all heads, slices of the key dim).
template <typename T, int kKeyDim, int kValueDim>
__global__ void __launch_bounds__(SecondOrderLayout<T, kKeyDim, kValueDim>::kThreads, 1)
    attention_second_order_query(SecondOrderParams p) {
  using Layout = SecondOrderLayout<T, kKeyDim, kValueDim>;
  using Queries = typename Layout::Queries;
  using Keys = typename Layout::Keys;
  constexpr TileShape kShape = Layout::kShape;
  constexpr int BLOCK_N = kShape.iterated, kTiles = BLOCK_N / 8, kColumns = Layout::kKeyColumns;
  using Tiles = KeyTiles<T, BLOCK_N, false>;
  const Problem& problem = p.first.problem;
  const Queries queries = Layout::template owned<Queries>();
  const int warp_row = uniform_warp() * kFragmentRows;
  const int first_column = static_cast<int>(blockIdx.y) * kColumns;
  const QueryBlock block(problem, blockIdx.x, queries.rows, MayPack<true>{});
  if (block.rows() <= 0) return;
  const Tiles tiles(problem, block);
  const HeadMask<T> mask_tangent(p.tangents.mask, block.batch, block.head);
  const int row = block.queries.begin + warp_row, warp_rows = block.rows() - warp_row;

  const KeyTangentSource<T, kKeyDim, kValueDim, BLOCK_N, kShape.warps> source(p.first, p.tangents, block.key_batch,
                                                                              block.key_head, 0);
  const auto load_keys = [&](const typename Tiles::Index& tile, int i) {
    source.copy(Layout::template iterated<Queries, Keys>(i), p.first, p.tangents, tile.key(), tile.all_live(),
                [&](int row) { return tile.is_live(row); });
  };
  const typename Tiles::Index first = tiles.first();
  copy_tile(queries, p.first, p.tangents, block.batch, block.head, block.queries.begin,
            [&](int row) { return row < block.rows(); });
  load_keys(first, 0);
  device::async_copy_commit();

  SecondOrderRow rows[2];
  {
    const RowState state = row_state<T>(p.first, block, row, warp_rows);
    float second_delta[2];
    row_products<T>(second_delta, p.tangent_out, p.first.grad_out, block, row, warp_rows, problem.value_dim);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int down = half * 8 + lane_row();
      const bool valid = down < warp_rows;
      rows[half] = {state.shift[half], state.delta[half],
                    valid ? *row_pointer(p.tangent_lse, block.batch, block.head, row + down) : 0.0f,
                    second_delta[half]};
      if (valid && lane_column() == 0 && blockIdx.y == 0) {
        p.first.delta[block.first_row + row + down] = rows[half].delta;
        p.second_delta[block.first_row + row + down] = rows[half].second_delta;
      }
    }
  }

  const Band window = Band::of<false>(problem, row);
  float sums[1][kColumns / 8][4] = {};
  const int stages = kShape.stages == 1 ? 1 : p.first.stages;
  pipeline(stages, tiles, first, load_keys, [&](const typename Tiles::Index& tile, int i) {
    const int key = tile.key();
    const Band band = window.from(key);
    if (warp_rows <= 0 || band.misses(kFragmentRows, BLOCK_N)) return;
    const bool masked = tiles.is_masked(tile, band, kFragmentRows) || mask_tangent.kind != MaskKind::kNone;
    Visible<1, kTiles> visible;
    if (masked) {
      visible = visible_scores<false, false, 1, kTiles>(band, tiles.mask, row, warp_rows, key, tile.live);
      if (!device::any_lane(visible.any())) return;
    }
    // scores
    const Keys keys = Layout::template iterated<Queries, Keys>(i);
    SecondOrderTile<T, kTiles> scores(p, queries, warp_row, keys, masked, visible, tiles.mask, mask_tangent, row, key);
    // softmax
    scores.softmax(problem, block.first_row, rows, masked, row, key);
    scores.uncap(p, queries, warp_row, keys);
    // accumulate
    const uint32_t live = masked ? visible.columns(tile.live) : 0;
    multiply_weights<T, true>(sums, scores.direction, keys.key(), first_column, problem.exact, masked, live);
    if (p.tangents.key.data != nullptr) {
      multiply_weights<T, true>(sums, scores.grads, keys.tangent_key(), first_column, problem.exact, masked, live);
    }
  });

  // epilogue
  const float factors[1][2] = {{problem.scale, problem.scale}};
  store_rows(row_pointer<T>(p.first.grad_query, block.batch, block.head, row) + first_column, p.first.grad_query.row,
             warp_rows, problem.key_dim - first_column, factors, sums);
}

// Scores are transposed: rows are keys, columns are queries. gridDim = (key tiles of all key heads, slices of the
// dims).
template <typename T, int kKeyDim, int kValueDim>
__global__ void __launch_bounds__(SecondOrderLayout<T, kKeyDim, kValueDim>::kThreads, 1)
    attention_second_order_key_value(SecondOrderParams p) {
  using Layout = SecondOrderLayout<T, kKeyDim, kValueDim>;
  using Queries = typename Layout::Queries;
  using Keys = typename Layout::Keys;
  constexpr TileShape kShape = Layout::kShape;
  constexpr int BLOCK_M = kShape.iterated, kTiles = BLOCK_M / 8;
  constexpr int kKeyColumns = Layout::kKeyColumns, kValueColumns = Layout::kValueColumns;
  using Tiles = QueryTiles<BLOCK_M>;
  const Problem& problem = p.first.problem;
  const Keys keys = Layout::template owned<Keys>();
  const int warp_row = uniform_warp() * kFragmentRows;
  const KeyBlock<true> block(problem, blockIdx.x, keys.rows);
  if (block.keys.empty()) return;
  const int key = block.keys.begin + warp_row, warp_rows = block.keys.end - key;
  const Tiles tiles = Tiles::template make<T, Layout::kMaxKeys, false>(problem, block);

  const QueryTangentSource<T, kKeyDim, kValueDim, BLOCK_M, kShape.warps> source(
      p.first, p.tangents, block.query_batch(problem), tiles.first_head);
  const auto load_queries = [&](const typename Tiles::Index& tile, int i) {
    const int head = tiles.head(tile), query = tiles.query(tile), existing = block.all_queries(problem) - query;
    const auto is_valid = [&](int row) { return row < existing; };
    const Queries queries = Layout::template iterated<Keys, Queries>(i);
    source.copy(queries, p.first, p.tangents, tiles, tile, existing >= BLOCK_M, is_valid);
    const int64_t first = block.first_row(problem, head) + query;
    const float* lse = row_pointer(p.first.lse, block.query_batch(problem), head, query);
    const float* mean = row_pointer(p.tangent_lse, block.query_batch(problem), head, query);
#pragma unroll 1
    for (int start = 0; start < BLOCK_M; start += blockDim.x) {  // the same number of steps for all threads: tile.cuh
      const int row = start + static_cast<int>(threadIdx.x);
      if (row >= BLOCK_M) continue;
      float* extra = queries.query().row_extra(row);
      const int bytes = is_valid(row) ? 4 : 0;
      device::async_copy<4>(extra, lse + row * p.first.lse.row, bytes);
      device::async_copy<4>(extra + 1, p.first.delta + first + row, bytes);
      device::async_copy<4>(extra + 2, mean + row * p.tangent_lse.row, bytes);
      device::async_copy<4>(extra + 3, p.second_delta + first + row, bytes);
    }
  };
  copy_tile(keys, p.first, p.tangents, block.batch(problem), block.key_head, block.keys.begin, 0,
            [&](int row) { return block.keys.begin + row < block.keys.end; });
  if (tiles.has_first()) load_queries(tiles.first(), 0);
  device::async_copy_commit();

  float key_sums[1][kKeyColumns / 8][4] = {}, value_sums[1][kValueColumns / 8][4] = {};
  const int key_column = static_cast<int>(blockIdx.y) * kKeyColumns;
  const int value_column = static_cast<int>(blockIdx.y) * kValueColumns;
  const Band window = Band::of<true>(problem, key);
  const int stages = kShape.stages == 1 ? 1 : p.first.stages;
  pipeline(stages, tiles, tiles.first(), load_queries, [&](const typename Tiles::Index& tile, int i) {
    const int head = tiles.head(tile), query = tiles.query(tile);
    const Band band = window.from(query);
    if (warp_rows <= 0 || band.misses(kFragmentRows, BLOCK_M)) return;
    const HeadMask<T> mask(problem.mask, block.batch(problem), head),
        mask_tangent(p.tangents.mask, block.batch(problem), head);
    const Range existing = tiles.queries(problem, block, tile);
    const bool masked = existing.end - query < BLOCK_M || !band.covers(kFragmentRows, BLOCK_M) ||
                        mask.kind != MaskKind::kNone || mask_tangent.kind != MaskKind::kNone;
    LiveBits<BLOCK_M> live = 0;
    Visible<1, kTiles> visible;
    if (masked) {
      live = mask.template live<BLOCK_M, true>(existing, query);
      visible = visible_scores<false, true, 1, kTiles>(band, mask, key, warp_rows, query, live);
      if (!device::any_lane(visible.any())) return;
    }
    // scores
    const Queries queries = Layout::template iterated<Keys, Queries>(i);
    float scores[1][kTiles][4] = {}, direction[1][kTiles][4] = {}, grads[1][kTiles][4] = {}, cross[1][kTiles][4] = {};
    multiply_rows(scores, keys.key(), warp_row, queries.query(), problem.exact);
    multiply_direction_transposed(direction, queries, keys, warp_row, p.tangents, problem.exact);
    multiply_rows(grads, keys.value(), warp_row, queries.grad_out(), problem.exact);
    if (p.tangents.value.data != nullptr) {
      multiply_rows(cross, keys.tangent_value(), warp_row, queries.grad_out(), problem.exact);
    }
    float direction_scale;
    const float scale = cap_direction<false>(scores, direction, problem, direction_scale);
    const float factor = mask_scores<false, true>(scores, scale, masked, visible, mask, key, query);
    mask_direction<true>(direction, direction_scale, masked, visible, mask_tangent, key, query);
    // softmax: scores = Pt^T, grads = dS^T, direction = dS2^T
    KeptScores<1, kTiles> kept;
    if (problem.dropout.seeds != nullptr) {
      kept = HeadDropout(problem, block.first_row(problem, head)).template kept_transposed<1, kTiles>(query, key);
      kept.apply(grads), kept.apply(cross);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      SecondOrderRow rows[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float extra[4];
        device::load_vector(queries.query().row_extra(n * 8 + lane_column() + i), extra);
        rows[i] = {weight_shift(kLog2e * extra[0]), extra[1], extra[2], extra[3]};
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        center(scores[0][n][i], factor, direction[0][n][i], grads[0][n][i], cross[0][n][i], rows[i % 2]);
      }
    }
    if (masked) {
      clear_where_zero(direction, scores), clear_where_zero(grads, scores), clear_where_zero(cross, scores);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) multiply(scores[0][n][i], direction[0][n][i], grads[0][n][i], cross[0][n][i]);
    }
    if (problem.dropout.seeds != nullptr) kept.apply(scores);
    // accumulate
    const uint32_t attended = masked ? visible.columns(live) : 0;
    if (value_column < kValueDim) {
      multiply_weights<T, true>(value_sums, scores, queries.grad_out(), value_column, problem.exact, masked, attended);
    }
    if (key_column < kKeyDim) {
      if (is_capped(problem)) {
        clear(scores), clear(cross);
        multiply_rows<true>(scores, keys.key(), warp_row, queries.query(), problem.exact);
        multiply_direction_transposed<true>(cross, queries, keys, warp_row, p.tangents, problem.exact);
        cap_gradients(grads, direction, scores, cross, problem);
      }
      multiply_weights<T, true>(key_sums, direction, queries.query(), key_column, problem.exact, masked, attended);
      if (p.tangents.query.data != nullptr) {
        multiply_weights<T, true>(key_sums, grads, queries.tangent(), key_column, problem.exact, masked, attended);
      }
    }
  });

  // epilogue
  const float factors[1][2] = {{problem.scale, problem.scale}}, ones[1][2] = {{1.0f, 1.0f}};
  store_rows(row_pointer<T>(p.first.grad_value, block.batch(problem), block.key_head, key) + value_column,
             p.first.grad_value.row, warp_rows, problem.value_dim - value_column, ones, value_sums);
  store_rows(row_pointer<T>(p.first.grad_key, block.batch(problem), block.key_head, key) + key_column,
             p.first.grad_key.row, warp_rows, problem.key_dim - key_column, factors, key_sums);
}

}  // namespace fastgen::attention
