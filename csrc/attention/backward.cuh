// Backward pass from the logsumexp, in O(N) memory (Dao, "FlashAttention-2", 2023). With S = scale * Q K^T + mask,
// P = 2^(S - lse), dP = dO V^T (both with dropout) and dS = P (dP - delta), two kernels, launched in this order:
//
//   attention_backward_query                          attention_backward_key_value
//     load Q, dO;  delta = rowsum(dO * O) - dlse        load K, V
//     for each visible key tile                         for each visible query tile of each head of the group
//       load K, V                                         load Q, dO, lse, delta
//       S = Q K^T, dP = dO V^T       scores               S^T = K Q^T, dP^T = V dO^T
//       P, dS                        softmax              P^T, dS^T
//       dQ += dS K                   accumulate           dV += P^T dO, dK += dS^T Q
//     dQ *= scale                    epilogue             dK *= scale
//
//                    keys, BLOCK_N at a time ->                         queries, BLOCK_M at a time ->
//   block: BLOCK_M   +---------+---------+---       block: BLOCK_N      +---------+---------+---
//   queries          | warp 0  |         |          keys                | warp 0  |         |
//                    | ...     |         |                              | ...     |         |
//
// With a softcap, dQ and dK take dS times the derivative of softcap.cuh.
//
// Every output is accumulated by one block in a fixed order, without atomics: results do not depend on the schedule.
#pragma once

#include "attention/dropout.cuh"
#include "attention/pipeline.cuh"
#include "attention/scheduler.cuh"
#include "attention/softcap.cuh"
#include "attention/softmax.cuh"
#include "attention/store.cuh"
#include "common/reduce.cuh"
#include "device/shared.cuh"

namespace fastgen::attention {

// Shared memory: the owned rows, then the stages of iterated rows: (Q, dO) and (K, V), or with kOwnsKeys the other way
// round.
template <typename T, int kKeyDim, int kValueDim, bool kOwnsKeys>
struct BackwardLayout {
  static constexpr Dims kDims = {kKeyDim, kValueDim};
  static constexpr TileShape kShape =
      kOwnsKeys ? backward_key_value_shape(kDims, sizeof(T)) : backward_query_shape(kDims, sizeof(T));
  static constexpr int kMaxRows = kShape.owned(kShape.warps);
  static constexpr int kKeyColumns = smaller(kKeyDim, kShape.columns);
  static constexpr int kValueColumns = smaller(kValueDim, kShape.columns);
  static constexpr int kThreads = 32 * kShape.warps, kWarpRows = kShape.fragments * kFragmentRows;
  using KeyDim = Tile<T, kKeyDim>;
  using ValueDim = Tile<T, kValueDim>;
  static constexpr int kKeyRow = row_bytes(kKeyDim, sizeof(T)), kValueRow = row_bytes(kValueDim, sizeof(T));

  static __device__ __forceinline__ int owned_rows() { return static_cast<int>(blockDim.x / 32) * kWarpRows; }
  static __device__ __forceinline__ KeyDim owned_key_dim() { return {reinterpret_cast<T*>(device::dynamic_shared())}; }
  static __device__ __forceinline__ ValueDim owned_value_dim() {
    return {reinterpret_cast<T*>(device::dynamic_shared() + owned_rows() * kKeyRow)};
  }
  static __device__ __forceinline__ unsigned char* stage(int i) {
    return device::dynamic_shared() + (owned_rows() + i * kShape.iterated) * (kKeyRow + kValueRow);
  }
  static __device__ __forceinline__ KeyDim key_dim(int i) { return {reinterpret_cast<T*>(stage(i))}; }
  static __device__ __forceinline__ ValueDim value_dim(int i) {
    return {reinterpret_cast<T*>(stage(i) + kShape.iterated * kKeyRow)};
  }
};

// Rows g and g + 8 of a fragment: what weight() subtracts, from the logsumexp, and delta.
struct RowState {
  float shift[2] = {INFINITY, INFINITY}, delta[2] = {0.0f, 0.0f};
};
// The same of one row.
struct RowValues {
  float shift, delta;
};

// rowsum(a * b) of rows g and g + 8 from ``row`` on; 0 for rows from ``count`` on. The four lanes of a row share the
// sum.
template <typename T>
__device__ __forceinline__ void row_products(float (&sums)[2], const Operand& a, const Operand& b,
                                             const QueryBlock& block, int row, int count, int columns) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int down = half * 8 + lane_row();
    float sum = 0.0f;
    if (down < count) {
      const T* left = row_pointer<T>(a, block.batch, block.head, row + down);
      const T* right = row_pointer<T>(b, block.batch, block.head, row + down);
      constexpr int kChunk = device::kVectorElements<T>;
      for (int column = threadIdx.x % 4 * kChunk; column < columns; column += 4 * kChunk) {
        T x[kChunk], y[kChunk];
        device::load_vector(left + column, x), device::load_vector(right + column, y);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) sum += device::to_float(x[i]) * device::to_float(y[i]);
      }
    }
    sums[half] = team_sum(sum, 4);
  }
}

// Of the fragment at ``row``, of which ``count`` rows exist.
template <typename T>
__device__ __forceinline__ RowState row_state(const BackwardParams& p, const QueryBlock& block, int row, int count) {
  RowState state;
  row_products<T>(state.delta, p.out, p.grad_out, block, row, count, p.problem.value_dim);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int down = half * 8 + lane_row();
    if (down < count) {
      state.shift[half] = weight_shift(kLog2e * *row_pointer(p.lse, block.batch, block.head, row + down));
      if (p.grad_lse.data != nullptr) {
        state.delta[half] -= *row_pointer(p.grad_lse, block.batch, block.head, row + down);
      }
    }
  }
  return state;
}

// grads = dP - delta, from dP before dropout.
template <bool kPlain, int kFragments, int kTiles>
__device__ __forceinline__ void center_gradients(float (&grads)[kFragments][kTiles][4],
                                                 const RowState (&state)[kFragments], const Problem& problem,
                                                 int64_t first_row, int query, int key) {
  if constexpr (!kPlain) {
    if (problem.dropout.seeds != nullptr) {
      HeadDropout(problem, first_row).template kept<kFragments, kTiles>(query, key).apply(grads);
    }
  }
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) grads[m][tile][i] -= state[m].delta[i / 2];
    }
  }
}

// left *= right.
template <int kFragments, int kTiles>
__device__ __forceinline__ void multiply_scores(float (&left)[kFragments][kTiles][4],
                                                const float (&right)[kFragments][kTiles][4]) {
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) left[m][tile][i] *= right[m][tile][i];
    }
  }
}

// scores = dS in place, from the results of mask_scores and their factor. ``grads``: dP - delta, overwritten. Where
// something is masked, dS is 0 where P is, even if the other factors are inf or NaN.
template <int kFragments, int kTiles>
__device__ __forceinline__ void score_gradients(float (&scores)[kFragments][kTiles][4], float factor,
                                                float (&grads)[kFragments][kTiles][4], bool masked,
                                                const RowState (&state)[kFragments]) {
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[m][tile][i] = weight(scores[m][tile][i], factor, state[m].shift[i / 2]);
      }
    }
  }
  if (masked) clear_where_zero(grads, scores);
  multiply_scores(scores, grads);
}

// gridDim = (query tiles of all heads, slices of the key dim).
template <typename T, int kKeyDim, int kValueDim, bool kPlain>
__global__ void __launch_bounds__(BackwardLayout<T, kKeyDim, kValueDim, false>::kThreads, 1)
    attention_backward_query(BackwardParams p) {
  using Layout = BackwardLayout<T, kKeyDim, kValueDim, false>;
  constexpr TileShape kShape = Layout::kShape;
  constexpr int BLOCK_N = kShape.iterated, kFragments = kShape.fragments, kTiles = BLOCK_N / 8;
  constexpr int kColumns = Layout::kKeyColumns;
  using Tiles = KeyTiles<T, BLOCK_N, kPlain>;
  const Problem& problem = p.problem;
  const int block_m = Layout::owned_rows(), warp_row = uniform_warp() * Layout::kWarpRows;
  const int first_column = static_cast<int>(blockIdx.y) * kColumns;
  const QueryBlock block(problem, blockIdx.x, block_m, MayPack<!kPlain>{});
  if (!kPlain && block.rows() <= 0) return;
  const Tiles tiles(problem, block);
  const int row = block.queries.begin + warp_row, warp_rows = block.rows() - warp_row;

  const auto load_queries = [&] {
    const auto is_valid = [&](int row) { return row < block.rows(); };
    copy_rows(Layout::owned_key_dim(), block_m, row_pointer<T>(p.query, block.batch, block.head, block.queries.begin),
              p.query.row, problem.key_dim, is_valid);
    copy_rows(Layout::owned_value_dim(), block_m,
              row_pointer<T>(p.grad_out, block.batch, block.head, block.queries.begin), p.grad_out.row,
              problem.value_dim, is_valid);
  };
  const TileSource<T, kKeyDim, BLOCK_N, kShape.warps> keys(row_pointer<T>(p.key, block.key_batch, block.key_head, 0),
                                                           p.key.row, problem.key_dim);
  const TileSource<T, kValueDim, BLOCK_N, kShape.warps> values(
      row_pointer<T>(p.value, block.key_batch, block.key_head, 0), p.value.row, problem.value_dim);
  const auto load_keys = [&](const typename Tiles::Index& tile, int i) {
    const auto is_live = [&](int row) { return tile.is_live(row); };
    const auto key = static_cast<unsigned>(tile.key());
    keys.copy(Layout::key_dim(i), key * p.key.row, tile.all_live(), is_live);
    values.copy(Layout::value_dim(i), key * p.value.row, tile.all_live(), is_live);
  };
  const typename Tiles::Index first = tiles.first();
  load_queries();
  load_keys(first, 0);
  device::async_copy_commit();

  RowState state[kFragments];
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
    state[m] = row_state<T>(p, block, row + m * kFragmentRows, warp_rows - m * kFragmentRows);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int down = m * kFragmentRows + half * 8 + lane_row();
      if (down < warp_rows && lane_column() == 0 && blockIdx.y == 0) {
        p.delta[block.first_row + row + down] = state[m].delta[half];
      }
    }
  }

  const Band window = Band::of<false>(problem, row);
  float sums[kFragments][kColumns / 8][4] = {};
  pipeline(p.stages, tiles, first, load_keys, [&](const typename Tiles::Index& tile, int i) {
    const int key = tile.key();
    const Band band = window.from(key);
    if (warp_rows <= 0 || band.misses(Layout::kWarpRows, BLOCK_N)) return;
    const bool masked = tiles.is_masked(tile, band, Layout::kWarpRows);
    Visible<kFragments, kTiles> visible;
    const auto find_visible = [&] {
      visible = visible_scores<kPlain, false, kFragments, kTiles>(band, tiles.mask, row, warp_rows, key, tile.live);
    };
    if (!kPlain && masked) {
      find_visible();
      if (!device::any_lane(visible.any())) return;
    }
    // scores
    float scores[kFragments][kTiles][4] = {}, grads[kFragments][kTiles][4] = {};
    multiply_rows(scores, Layout::owned_key_dim(), warp_row, Layout::key_dim(i), problem.exact);
    multiply_rows(grads, Layout::owned_value_dim(), warp_row, Layout::value_dim(i), problem.exact);
    if (kPlain && masked) find_visible();
    center_gradients<kPlain>(grads, state, problem, block.first_row, row, key);
    const float scale = cap_scores<kPlain>(scores, grads, problem);
    const float factor = mask_scores<kPlain, false>(scores, scale, masked, visible, tiles.mask, row, key);
    // softmax
    score_gradients(scores, factor, grads, masked, state);
    // accumulate
    const uint32_t live = kPlain || !masked ? 0 : visible.columns(tile.live);
    multiply_weights<T, (kColumns > 128)>(sums, scores, Layout::key_dim(i), first_column, problem.exact,
                                          !kPlain && masked, live);
  });

  // epilogue
  float factors[kFragments][2];
#pragma unroll
  for (int m = 0; m < kFragments; ++m) factors[m][0] = factors[m][1] = problem.scale;
  store_rows(row_pointer<T>(p.grad_query, block.batch, block.head, row) + first_column, p.grad_query.row, warp_rows,
             problem.key_dim - first_column, factors, sums);
}

// Scores are transposed: rows are keys, columns are queries. gridDim = (key tiles of all key heads, slices of the
// dims).
template <typename T, int kKeyDim, int kValueDim, bool kPlain>
__global__ void __launch_bounds__(BackwardLayout<T, kKeyDim, kValueDim, true>::kThreads, 1)
    attention_backward_key_value(BackwardParams p) {
  using Layout = BackwardLayout<T, kKeyDim, kValueDim, true>;
  constexpr TileShape kShape = Layout::kShape;
  constexpr int BLOCK_M = kShape.iterated, kFragments = kShape.fragments, kTiles = BLOCK_M / 8;
  constexpr int kKeyColumns = Layout::kKeyColumns, kValueColumns = Layout::kValueColumns;
  using Tiles = QueryTiles<BLOCK_M>;
  const Problem& problem = p.problem;
  const int block_n = Layout::owned_rows(), warp_row = uniform_warp() * Layout::kWarpRows;
  const KeyBlock<!kPlain> block(problem, blockIdx.x, block_n);
  if (!kPlain && block.keys.empty()) return;
  const int key = block.keys.begin + warp_row, warp_rows = block.keys.end - key;
  const Tiles tiles = Tiles::template make<T, Layout::kMaxRows, kPlain>(problem, block);

  const auto load_keys = [&] {
    const auto is_valid = [&](int row) { return block.keys.begin + row < block.keys.end; };
    copy_rows(Layout::owned_key_dim(), block_n,
              row_pointer<T>(p.key, block.batch(problem), block.key_head, block.keys.begin), p.key.row, problem.key_dim,
              is_valid);
    copy_rows(Layout::owned_value_dim(), block_n,
              row_pointer<T>(p.value, block.batch(problem), block.key_head, block.keys.begin), p.value.row,
              problem.value_dim, is_valid);
  };
  const TileSource<T, kKeyDim, BLOCK_M, kShape.warps> queries(
      row_pointer<T>(p.query, block.query_batch(problem), tiles.first_head, 0), p.query.row, problem.key_dim);
  const TileSource<T, kValueDim, BLOCK_M, kShape.warps> grad_outs(
      row_pointer<T>(p.grad_out, block.query_batch(problem), tiles.first_head, 0), p.grad_out.row, problem.value_dim);
  const auto load_queries = [&](const typename Tiles::Index& tile, int i) {
    const int head = tiles.head(tile), query = tiles.query(tile), existing = block.all_queries(problem) - query;
    const auto is_valid = [&](int row) { return row < existing; };
    queries.copy(Layout::key_dim(i), tiles.offset(p.query, tile), existing >= BLOCK_M, is_valid);
    grad_outs.copy(Layout::value_dim(i), tiles.offset(p.grad_out, tile), existing >= BLOCK_M, is_valid);
    const float* lse = row_pointer(p.lse, block.query_batch(problem), head, query);
    const float* delta = p.delta + block.first_row(problem, head) + query;
#pragma unroll 1
    for (int first = 0; first < BLOCK_M; first += blockDim.x) {  // the same number of steps for all threads: tile.cuh
      const int row = first + static_cast<int>(threadIdx.x);
      if (row >= BLOCK_M) continue;
      float* extra = Layout::key_dim(i).row_extra(row);
      device::async_copy<4>(extra, lse + row * p.lse.row, is_valid(row) ? 4 : 0);
      device::async_copy<4>(extra + 1, delta + row, is_valid(row) ? 4 : 0);
    }
  };
  load_keys();
  if (tiles.has_first()) load_queries(tiles.first(), 0);
  device::async_copy_commit();

  float key_sums[kFragments][kKeyColumns / 8][4] = {}, value_sums[kFragments][kValueColumns / 8][4] = {};
  const int key_column = static_cast<int>(blockIdx.y) * kKeyColumns;
  const int value_column = static_cast<int>(blockIdx.y) * kValueColumns;
  const Band window = Band::of<true>(problem, key);
  pipeline(p.stages, tiles, tiles.first(), load_queries, [&](const typename Tiles::Index& tile, int i) {
    const int head = tiles.head(tile), query = tiles.query(tile);
    const Band band = window.from(query);
    if (warp_rows <= 0 || band.misses(Layout::kWarpRows, BLOCK_M)) return;
    const HeadMask<T> mask(problem.mask, block.batch(problem), head);
    const Range existing = tiles.queries(problem, block, tile);
    const bool masked = existing.end - query < BLOCK_M || !band.covers(Layout::kWarpRows, BLOCK_M) ||
                        (!kPlain && mask.kind != MaskKind::kNone);
    LiveBits<BLOCK_M> live = 0;
    Visible<kFragments, kTiles> visible;
    const auto find_visible = [&] {
      live = mask.template live<BLOCK_M, true>(existing, query);
      visible = visible_scores<kPlain, true, kFragments, kTiles>(band, mask, key, warp_rows, query, live);
    };
    if (!kPlain && masked) {
      find_visible();
      if (!device::any_lane(visible.any())) return;
    }
    // scores
    const auto queries = Layout::key_dim(i);
    float scores[kFragments][kTiles][4] = {}, grads[kFragments][kTiles][4] = {};
    multiply_rows(scores, Layout::owned_key_dim(), warp_row, queries, problem.exact);
    multiply_rows(grads, Layout::owned_value_dim(), warp_row, Layout::value_dim(i), problem.exact);
    if (kPlain && masked) find_visible();
    // softmax: scores = dropout(P)^T, grads = dS^T
    KeptScores<kFragments, kTiles> kept;
    if constexpr (!kPlain) {
      if (problem.dropout.seeds != nullptr) {
        const HeadDropout dropout(problem, block.first_row(problem, head));
        kept = dropout.template kept_transposed<kFragments, kTiles>(query, key);
        kept.apply(grads);
      }
    }
    const auto row_state = [&](int query) {
      uint32_t state[2];
      device::load_words(queries.row_extra(query), state);
      return RowValues{weight_shift(kLog2e * bits_to_float(state[0])), bits_to_float(state[1])};
    };
    const bool capped = !kPlain && is_capped(problem);
    if (capped) {  // grads = (dP - delta) times the derivative
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float delta = row_state(n * 8 + lane_column() + e % 2).delta;
#pragma unroll
          for (int m = 0; m < kFragments; ++m) grads[m][n][e] -= delta;
        }
      }
    }
    const float scale = cap_scores<kPlain>(scores, grads, problem);
    const float factor = mask_scores<kPlain, true>(scores, scale, masked, visible, mask, key, query);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const RowValues values = row_state(n * 8 + lane_column() + i);
#pragma unroll
        for (int m = 0; m < kFragments; ++m) {
#pragma unroll
          for (int e = i; e < 4; e += 2) {
            scores[m][n][e] = weight(scores[m][n][e], factor, values.shift);
            grads[m][n][e] -= capped ? 0.0f : values.delta;
          }
        }
      }
    }
    if (masked) clear_where_zero(grads, scores);
    multiply_scores(grads, scores);
    if constexpr (!kPlain) {
      if (problem.dropout.seeds != nullptr) kept.apply(scores);
    }
    // accumulate
    const uint32_t attended = kPlain || !masked ? 0 : visible.columns(live);
    if (value_column < kValueDim) {
      multiply_weights<T>(value_sums, scores, Layout::value_dim(i), value_column, problem.exact, !kPlain && masked,
                          attended);
    }
    if (key_column < kKeyDim) {
      multiply_weights<T>(key_sums, grads, queries, key_column, problem.exact, !kPlain && masked, attended);
    }
  });

  // epilogue
  float factors[kFragments][2], ones[kFragments][2];
#pragma unroll
  for (int m = 0; m < kFragments; ++m) factors[m][0] = factors[m][1] = problem.scale, ones[m][0] = ones[m][1] = 1.0f;
  store_rows(row_pointer<T>(p.grad_value, block.batch(problem), block.key_head, key) + value_column, p.grad_value.row,
             warp_rows, problem.value_dim - value_column, ones, value_sums);
  store_rows(row_pointer<T>(p.grad_key, block.batch(problem), block.key_head, key) + key_column, p.grad_key.row,
             warp_rows, problem.key_dim - key_column, factors, key_sums);
}

}  // namespace fastgen::attention
