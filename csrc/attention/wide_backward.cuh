// Backward pass of wide heads: the kernels of backward.cuh with eight warps that share the scores of a tile, so that
// each score and its gradient are computed once. Warps 0-3 compute 16 x 16 scores each, warps 4-7 the same part of dP,
// which they leave in shared memory; warps 0-3 turn both into P and dS. Every warp multiplies all rows of them, for an
// eighth of the columns of the result.
//
//          BLOCK_N               BLOCK_N              key dim
//        +----+----+           +----+----+         +---+---+-----+---+
//   rows | 0  | 2  |           | 4  | 6  |         | w | w |     | w |
//        +----+----+           +----+----+    ->   | a | a | ... | a |
//        | 1  | 3  |           | 5  | 7  |         | r | r |     | r |
//        +----+----+           +----+----+         | p | p |     | p |
//        S = Q K^T             dP = dO V^T         | 0 | 1 |     | 7 |
//                                                  +---+---+-----+---+
//                                                     dQ += dS K
//
// attention_backward_key_value_wide has keys as rows and queries as columns, and two results.
#pragma once

#include "attention/backward.cuh"
#include "attention/wide_tile.cuh"

namespace fastgen::attention {

// Shared memory: the owned rows, P and dS, dP, live columns, then the stages of the iterated rows.
template <typename T, int kKeyDim, int kValueDim>
struct WideBackwardLayout {
  static constexpr int kOwned = kWideBackward.owned, kIterated = kWideBackward.iterated;
  static constexpr int kThreads = 32 * kWideWarps, kScoreWarps = kWideWarps / 2;
  static constexpr int kFragments = kOwned / kFragmentRows, kParts = kScoreWarps / kFragments;
  static constexpr int kPartColumns = kIterated / kParts, kTiles = kPartColumns / 8;
  static_assert(kPartColumns == 16, "a warp has 16 x 16 scores");
  static constexpr int kKeyColumns = kKeyDim / kWideWarps, kValueColumns = kValueDim / kWideWarps;
  using KeyDim = Tile<T, kKeyDim>;
  using ValueDim = Tile<T, kValueDim>;
  using Weights = Tile<T, kIterated>;
  static constexpr int kKeyRow = row_bytes(kKeyDim, sizeof(T)), kValueRow = row_bytes(kValueDim, sizeof(T));
  static constexpr int kWeightsBytes = kOwned * row_bytes(kIterated, sizeof(T));
  static constexpr int kGradsBegin = kOwned * (kKeyRow + kValueRow) + 2 * kWeightsBytes;
  static constexpr int kLiveBegin = kGradsBegin + kOwned * kIterated * static_cast<int>(sizeof(float));
  static constexpr int kStateBytes = wide_backward_state_bytes({kKeyDim, kValueDim}, sizeof(T));

  static __device__ __forceinline__ unsigned char* shared() { return device::dynamic_shared(); }
  static __device__ __forceinline__ KeyDim owned_key_dim() { return {reinterpret_cast<T*>(shared())}; }
  static __device__ __forceinline__ ValueDim owned_value_dim() {
    return {reinterpret_cast<T*>(shared() + kOwned * kKeyRow)};
  }
  // 0: dS, 1: P.
  static __device__ __forceinline__ Weights weights(int i) {
    return {reinterpret_cast<T*>(shared() + kOwned * (kKeyRow + kValueRow) + i * kWeightsBytes)};
  }
  // Element i of tile n of a score warp's dP, in this lane.
  static __device__ __forceinline__ float* grads(int score_warp) {
    return reinterpret_cast<float*>(shared() + kGradsBegin) + score_warp * kTiles * 4 * 32 + threadIdx.x % 32;
  }
  static __device__ __forceinline__ uint32_t* live() { return reinterpret_cast<uint32_t*>(shared() + kLiveBegin); }
  static __device__ __forceinline__ unsigned char* stage(int i) {
    return shared() + kStateBytes + i * kIterated * (kKeyRow + kValueRow);
  }
  static __device__ __forceinline__ KeyDim key_dim(int i) { return {reinterpret_cast<T*>(stage(i))}; }
  static __device__ __forceinline__ ValueDim value_dim(int i) {
    return {reinterpret_cast<T*>(stage(i) + kIterated * kKeyRow)};
  }

  // The part of a warp: the one of its scores, or of dP.
  struct Part {
    int number, row, column;
    bool has_scores;

    __device__ __forceinline__ Part() {
      const int warp = static_cast<int>(threadIdx.x / 32);
      number = warp % kScoreWarps, has_scores = warp < kScoreWarps;
      row = number % kFragments * kFragmentRows, column = number / kFragments * kPartColumns;
    }
    __device__ __forceinline__ int barrier() const { return 1 + number; }
  };

  // dP of a part, for the warp with its scores.
  static __device__ __forceinline__ void send_grads(const Part& part, int stage, bool exact) {
    float sums[1][kTiles][4] = {};
    const ValueDim columns = {value_dim(stage).at(part.column, 0)};
    multiply_rows(sums, owned_value_dim(), part.row, columns, exact);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) grads(part.number)[(n * 4 + i) * 32] = sums[0][n][i];
    }
    device::arrive_named(part.barrier(), 64);
  }
  static __device__ __forceinline__ void receive_grads(const Part& part, float (&sums)[1][kTiles][4]) {
    device::sync_named(part.barrier(), 64);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[0][n][i] = grads(part.number)[(n * 4 + i) * 32];
    }
  }
};

// gridDim = (query tiles of all heads).
template <typename T, int kKeyDim, int kValueDim, bool kPlain>
__global__ void __launch_bounds__(WideBackwardLayout<T, kKeyDim, kValueDim>::kThreads, 1)
    attention_backward_query_wide(BackwardParams p) {
  using Layout = WideBackwardLayout<T, kKeyDim, kValueDim>;
  constexpr int BLOCK_M = Layout::kOwned, BLOCK_N = Layout::kIterated, kTiles = Layout::kTiles;
  constexpr int kFragments = Layout::kFragments, kColumns = Layout::kKeyColumns;
  using Tiles = KeyTiles<T, BLOCK_N, kPlain>;
  const Problem& problem = p.problem;
  const typename Layout::Part part;
  const int first_column = static_cast<int>(threadIdx.x / 32) * kColumns;
  const QueryBlock block(problem, blockIdx.x, BLOCK_M, MayPack<!kPlain>{});
  if (!kPlain && block.rows() <= 0) return;
  const Tiles tiles(problem, block);
  const int row = block.queries.begin + part.row, part_rows = block.rows() - part.row;

  const auto load_keys = [&](const typename Tiles::Index& tile, int i) {
    const auto is_live = [&](int row) { return tile.is_live(row); };
    copy_rows(Layout::key_dim(i), BLOCK_N, row_pointer<T>(p.key, block.key_batch, block.key_head, tile.key()),
              p.key.row, problem.key_dim, is_live);
    copy_rows(Layout::value_dim(i), BLOCK_N, row_pointer<T>(p.value, block.key_batch, block.key_head, tile.key()),
              p.value.row, problem.value_dim, is_live);
  };
  const auto is_query = [&](int row) { return row < block.rows(); };
  copy_rows(Layout::owned_key_dim(), BLOCK_M, row_pointer<T>(p.query, block.batch, block.head, block.queries.begin),
            p.query.row, problem.key_dim, is_query);
  copy_rows(Layout::owned_value_dim(), BLOCK_M,
            row_pointer<T>(p.grad_out, block.batch, block.head, block.queries.begin), p.grad_out.row, problem.value_dim,
            is_query);
  const typename Tiles::Index first = tiles.first();
  load_keys(first, 0);
  device::async_copy_commit();

  // Of the 16 rows at part.row; warps without scores have no use for it.
  RowState state[1];
  state[0] = row_state<T>(p, block, row, part_rows);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int down = half * 8 + lane_row();
    if (part.has_scores && part.column == 0 && down < part_rows && lane_column() == 0) {
      p.delta[block.first_row + row + down] = state[0].delta[half];
    }
  }

  // The window as the rows of the warp see it, and as those of the block do.
  const Band window = Band::of<false>(problem, row), block_window = Band::of<false>(problem, block.queries.begin);
  float sums[kFragments][kColumns / 8][4] = {};
  pipeline(p.stages, tiles, first, load_keys, [&](const typename Tiles::Index& tile, int stage) {
    const bool masked = tiles.is_masked(tile, block_window.from(tile.key()), BLOCK_M);
    if (!part.has_scores) {
      Layout::send_grads(part, stage, problem.exact);
    } else {
      // scores
      const int key = tile.key() + part.column;
      const auto live = static_cast<LiveBits<8 * kTiles>>(tile.live >> part.column) & full<8 * kTiles>();
      Visible<1, kTiles> visible;
      if (masked) {
        visible = visible_scores<kPlain, false, 1, kTiles>(window.from(key), tiles.mask, row, part_rows, key, live);
      }
      float scores[1][kTiles][4] = {}, grads[1][kTiles][4];
      const typename Layout::KeyDim keys = {Layout::key_dim(stage).at(part.column, 0)};
      multiply_rows(scores, Layout::owned_key_dim(), part.row, keys, problem.exact);
      Layout::receive_grads(part, grads);
      center_gradients<kPlain>(grads, state, problem, block.first_row, row, key);
      const float scale = cap_scores<kPlain>(scores, grads, problem);
      const float factor = mask_scores<kPlain, false>(scores, scale, masked, visible, tiles.mask, row, key);
      // softmax
      score_gradients(scores, factor, grads, masked, state);
      store_weights(Layout::weights(0), part.row, part.column, scores);
      if (!kPlain && masked) store_live(Layout::live(), part.number, visible.columns(live));
    }
    device::sync_block();
    // accumulate
    const uint32_t attended = kPlain || !masked ? 0 : load_live<kFragments, Layout::kParts>(Layout::live());
    if (first_column < problem.key_dim) {
      multiply_shared_weights(sums, Layout::weights(0), Layout::key_dim(stage), first_column, !kPlain && masked,
                              attended);
    }
  });

  // epilogue
  float factors[kFragments][2];
#pragma unroll
  for (int m = 0; m < kFragments; ++m) factors[m][0] = factors[m][1] = problem.scale;
  store_rows(row_pointer<T>(p.grad_query, block.batch, block.head, block.queries.begin) + first_column,
             p.grad_query.row, block.rows(), problem.key_dim - first_column, factors, sums);
}

// Scores are transposed: rows are keys, columns are queries. gridDim = (key tiles of all key heads).
template <typename T, int kKeyDim, int kValueDim, bool kPlain>
__global__ void __launch_bounds__(WideBackwardLayout<T, kKeyDim, kValueDim>::kThreads, 1)
    attention_backward_key_value_wide(BackwardParams p) {
  using Layout = WideBackwardLayout<T, kKeyDim, kValueDim>;
  constexpr int BLOCK_N = Layout::kOwned, BLOCK_M = Layout::kIterated, kTiles = Layout::kTiles;
  constexpr int kFragments = Layout::kFragments;
  constexpr int kKeyColumns = Layout::kKeyColumns, kValueColumns = Layout::kValueColumns;
  using Tiles = QueryTiles<BLOCK_M>;
  const Problem& problem = p.problem;
  const typename Layout::Part part;
  const int key_column = static_cast<int>(threadIdx.x / 32) * kKeyColumns;
  const int value_column = static_cast<int>(threadIdx.x / 32) * kValueColumns;
  const KeyBlock<!kPlain> block(problem, blockIdx.x, BLOCK_N);
  if (!kPlain && block.keys.empty()) return;
  const int key = block.keys.begin + part.row, part_rows = block.keys.end - key;
  const Tiles tiles = Tiles::template make<T, BLOCK_N, kPlain>(problem, block);

  const auto is_key = [&](int row) { return block.keys.begin + row < block.keys.end; };
  copy_rows(Layout::owned_key_dim(), BLOCK_N,
            row_pointer<T>(p.key, block.batch(problem), block.key_head, block.keys.begin), p.key.row, problem.key_dim,
            is_key);
  copy_rows(Layout::owned_value_dim(), BLOCK_N,
            row_pointer<T>(p.value, block.batch(problem), block.key_head, block.keys.begin), p.value.row,
            problem.value_dim, is_key);
  const auto load_queries = [&](const typename Tiles::Index& tile, int i) {
    const int head = tiles.head(tile), query = tiles.query(tile);
    const auto is_valid = [&](int row) { return query + row < block.all_queries(problem); };
    const auto queries = Layout::key_dim(i);
    copy_rows(queries, BLOCK_M, row_pointer<T>(p.query, block.query_batch(problem), head, query), p.query.row,
              problem.key_dim, is_valid);
    copy_rows(Layout::value_dim(i), BLOCK_M, row_pointer<T>(p.grad_out, block.query_batch(problem), head, query),
              p.grad_out.row, problem.value_dim, is_valid);
    const float* lse = row_pointer(p.lse, block.query_batch(problem), head, query);
    const float* delta = p.delta + block.first_row(problem, head) + query;
    for (int row = threadIdx.x; row < BLOCK_M; row += blockDim.x) {
      device::async_copy<4>(queries.row_extra(row), lse + row * p.lse.row, is_valid(row) ? 4 : 0);
      device::async_copy<4>(queries.row_extra(row) + 1, delta + row, is_valid(row) ? 4 : 0);
    }
  };
  if (tiles.has_first()) load_queries(tiles.first(), 0);
  device::async_copy_commit();

  float key_sums[kFragments][kKeyColumns / 8][4] = {}, value_sums[kFragments][kValueColumns / 8][4] = {};
  const Band window = Band::of<true>(problem, key), block_window = Band::of<true>(problem, block.keys.begin);
  pipeline(p.stages, tiles, tiles.first(), load_queries, [&](const typename Tiles::Index& tile, int stage) {
    const int head = tiles.head(tile), first_query = tiles.query(tile), query = first_query + part.column;
    const HeadMask<T> mask(problem.mask, block.batch(problem), head);
    const Range existing = tiles.queries(problem, block, tile);
    const bool masked = existing.end - first_query < BLOCK_M ||
                        !block_window.from(first_query).covers(BLOCK_N, BLOCK_M) ||
                        (!kPlain && mask.kind != MaskKind::kNone);
    if (!part.has_scores) {
      Layout::send_grads(part, stage, problem.exact);
    } else {
      // scores
      const auto live = mask.template live<8 * kTiles, true>(existing, query);
      Visible<1, kTiles> visible;
      if (masked) {
        visible = visible_scores<kPlain, true, 1, kTiles>(window.from(query), mask, key, part_rows, query, live);
      }
      float scores[1][kTiles][4] = {}, grads[1][kTiles][4];
      const typename Layout::KeyDim queries = {Layout::key_dim(stage).at(part.column, 0)};
      multiply_rows(scores, Layout::owned_key_dim(), part.row, queries, problem.exact);
      // softmax: scores = dropout(P)^T, grads = dS^T
      Layout::receive_grads(part, grads);
      KeptScores<1, kTiles> kept;
      if constexpr (!kPlain) {
        if (problem.dropout.seeds != nullptr) {
          kept = HeadDropout(problem, block.first_row(problem, head)).template kept_transposed<1, kTiles>(query, key);
          kept.apply(grads);
        }
      }
      float shifts[kTiles][2];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float* state = queries.row_extra(n * 8 + lane_column() + i);
          shifts[n][i] = weight_shift(kLog2e * state[0]);
          grads[0][n][i] -= state[1], grads[0][n][i + 2] -= state[1];
        }
      }
      const float scale = cap_scores<kPlain>(scores, grads, problem);
      const float factor = mask_scores<kPlain, true>(scores, scale, masked, visible, mask, key, query);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[0][n][i] = weight(scores[0][n][i], factor, shifts[n][i % 2]);
      }
      if (masked) clear_where_zero(grads, scores);
      multiply_scores(grads, scores);
      if constexpr (!kPlain) {
        if (problem.dropout.seeds != nullptr) kept.apply(scores);
      }
      store_weights(Layout::weights(0), part.row, part.column, grads);
      store_weights(Layout::weights(1), part.row, part.column, scores);
      if (!kPlain && masked) store_live(Layout::live(), part.number, visible.columns(live));
    }
    device::sync_block();
    // accumulate
    const uint32_t attended = kPlain || !masked ? 0 : load_live<kFragments, Layout::kParts>(Layout::live());
    if (value_column < problem.value_dim) {
      multiply_shared_weights(value_sums, Layout::weights(1), Layout::value_dim(stage), value_column, !kPlain && masked,
                              attended);
    }
    if (key_column < problem.key_dim) {
      multiply_shared_weights(key_sums, Layout::weights(0), Layout::key_dim(stage), key_column, !kPlain && masked,
                              attended);
    }
  });

  // epilogue
  float factors[kFragments][2], ones[kFragments][2];
#pragma unroll
  for (int m = 0; m < kFragments; ++m) factors[m][0] = factors[m][1] = problem.scale, ones[m][0] = ones[m][1] = 1.0f;
  const int rows = block.keys.end - block.keys.begin;
  store_rows(row_pointer<T>(p.grad_value, block.batch(problem), block.key_head, block.keys.begin) + value_column,
             p.grad_value.row, rows, problem.value_dim - value_column, ones, value_sums);
  store_rows(row_pointer<T>(p.grad_key, block.batch(problem), block.key_head, block.keys.begin) + key_column,
             p.grad_key.row, rows, problem.key_dim - key_column, factors, key_sums);
}

}  // namespace fastgen::attention
