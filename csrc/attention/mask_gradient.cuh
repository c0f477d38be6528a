// The gradient of a float mask: dS (or dS2, mask_second_order.cuh), summed over the dims that the mask is broadcast to,
// in O(size of the mask) memory:
//
//   for each tile of scores that the mask's tile is broadcast to     load Q, dO, K, V
//     S = scale * Q K^T + mask, dP = dO V^T                          scores
//     dS = P (dP - delta)                                            softmax
//     sums += dS                                                     accumulate
//   reduce over rows or columns, store                               epilogue
//
//               mask: BLOCK_N keys, or all of them if broadcast
//              +-------------------+
//   BLOCK_M    | warp 0: 16 queries|   a block owns one such tile of one (batch, head) of the mask; its part of the
//   queries    | ...               |   sum is blockIdx.y of ``splits``: attention_sum_parts adds them in order
//              +-------------------+
//
// Each sum has one fixed order. gridDim = (tiles of the mask, splits).
#pragma once

#include "attention/backward.cuh"
#include "attention/mask_reduce.cuh"

namespace fastgen::attention {

// A tile of scores: its first query and key.
struct ScoreTile {
  int batch, head, query, key;

  __device__ __forceinline__ int key_head(const Problem& p) const { return head / (p.heads / p.key_heads); }
  __device__ __forceinline__ int64_t first_row(const Problem& p) const {
    return (static_cast<int64_t>(batch) * p.heads + head) * p.queries;
  }
};

// The tile of the mask that a block owns, and the tiles of scores that it iterates over.
struct ScoreTiles {
  using Index = int;
  int owned[4];     // the tile of the mask: batch, head, query tile, key tile
  int iterated[4];  // how many of each
  int block_m, block_n, count;
  int64_t first_tile;

  __device__ __forceinline__ ScoreTiles(const Problem& problem, const MaskGradient& gradient, int block_m, int block_n)
      : block_m(block_m), block_n(block_n) {
    const int query_tiles = static_cast<int>(ceil_div(problem.queries, block_m));
    const int key_tiles = static_cast<int>(ceil_div(problem.keys, block_n));
    const bool one_row = gradient.sizes[2] == 1, one_column = gradient.sizes[3] == 1;
    const int tiles[4] = {gradient.sizes[0], gradient.sizes[1], one_row ? 1 : query_tiles, one_column ? 1 : key_tiles};
    int64_t rest = blockIdx.x;
    for (int i = 3; i >= 0; --i) owned[i] = static_cast<int>(rest % tiles[i]), rest /= tiles[i];
    iterated[0] = gradient.sizes[0] == 1 ? problem.batch : 1, iterated[1] = gradient.sizes[1] == 1 ? problem.heads : 1;
    iterated[2] = one_row ? query_tiles : 1, iterated[3] = one_column ? key_tiles : 1;
    const int64_t all = int64_t{iterated[0]} * iterated[1] * iterated[2] * iterated[3];
    first_tile = all * blockIdx.y / gradient.splits;
    count = static_cast<int>(all * (blockIdx.y + 1) / gradient.splits - first_tile);
  }
  __device__ __forceinline__ bool has_first() const { return count > 0; }
  __device__ __forceinline__ Index first() const { return 0; }
  __device__ __forceinline__ Index next(Index index) const { return index + 1; }
  __device__ __forceinline__ bool contains(Index index) const { return index < count; }

  __device__ __forceinline__ ScoreTile at(Index index) const {
    int64_t rest = first_tile + index;
    int part[4];
    for (int i = 3; i >= 0; --i) part[i] = static_cast<int>(rest % iterated[i]), rest /= iterated[i];
    return {iterated[0] > 1 ? part[0] : owned[0], iterated[1] > 1 ? part[1] : owned[1],
            (iterated[2] > 1 ? part[2] : owned[2]) * block_m, (iterated[3] > 1 ? part[3] : owned[3]) * block_n};
  }

  // Stores an entry of the owned head's gradient, or of this block's part of it. T: the query's storage type.
  template <typename T>
  __device__ __forceinline__ void store(const MaskGradient& gradient, int row, int column, float value) const {
    if (row >= gradient.sizes[2] || column >= gradient.sizes[3]) return;
    const int64_t head = int64_t{owned[0]} * gradient.sizes[1] + owned[1];
    const int64_t at = (head * gradient.sizes[2] + row) * gradient.sizes[3] + column;
    if (gradient.parts != nullptr) {
      gradient.parts[blockIdx.y * elements(gradient) + at] = value;
    } else {
      store_gradient<T>(gradient, at, value);
    }
  }
};

// First order: dS of a tile. Shared memory: stages of (K, V, Q, dO).
template <typename T, int kKeyDim, int kValueDim>
struct FirstOrderScores {
  using Params = BackwardParams;
  using Type = T;
  static constexpr TileShape kShape = mask_gradient_shape({kKeyDim, kValueDim}, sizeof(T));
  static constexpr int BLOCK_N = kShape.iterated, kTiles = BLOCK_N / 8;
  static constexpr int kKeyRow = row_bytes(kKeyDim, sizeof(T)), kValueRow = row_bytes(kValueDim, sizeof(T));
  using KeyDim = Tile<T, kKeyDim>;
  using ValueDim = Tile<T, kValueDim>;
  unsigned char* stage;
  int block_m;

  __device__ __forceinline__ FirstOrderScores(int block_m, int i)
      : stage(device::dynamic_shared() + i % kShape.stages * (block_m + BLOCK_N) * (kKeyRow + kValueRow)),
        block_m(block_m) {}
  static __device__ __forceinline__ const Problem& problem(const Params& p) { return p.problem; }
  __device__ __forceinline__ KeyDim key() const { return {reinterpret_cast<T*>(stage)}; }
  __device__ __forceinline__ ValueDim value() const { return {reinterpret_cast<T*>(stage + BLOCK_N * kKeyRow)}; }
  __device__ __forceinline__ KeyDim query() const {
    return {reinterpret_cast<T*>(stage + BLOCK_N * (kKeyRow + kValueRow))};
  }
  __device__ __forceinline__ ValueDim grad_out() const {
    return {reinterpret_cast<T*>(stage + BLOCK_N * (kKeyRow + kValueRow) + block_m * kKeyRow)};
  }

  __device__ __forceinline__ void load(const Params& p, const ScoreTile& tile) const {
    const Problem& problem = p.problem;
    const int key_head = tile.key_head(problem);
    const auto is_query = [&](int row) { return tile.query + row < problem.queries; };
    const auto is_key = [&](int row) { return tile.key + row < problem.keys; };
    copy_rows(query(), block_m, row_pointer<T>(p.query, tile.batch, tile.head, tile.query), p.query.row,
              problem.key_dim, is_query);
    copy_rows(grad_out(), block_m, row_pointer<T>(p.grad_out, tile.batch, tile.head, tile.query), p.grad_out.row,
              problem.value_dim, is_query);
    copy_rows(key(), BLOCK_N, row_pointer<T>(p.key, tile.batch, key_head, tile.key), p.key.row, problem.key_dim,
              is_key);
    copy_rows(value(), BLOCK_N, row_pointer<T>(p.value, tile.batch, key_head, tile.key), p.value.row, problem.value_dim,
              is_key);
  }

  __device__ __forceinline__ void accumulate(float (&sums)[kTiles][4], const Params& p, const ScoreTile& tile,
                                             int warp_row, Visible<1, kTiles>& visible, const HeadMask<T>& mask) const {
    const Problem& problem = p.problem;
    const int row = tile.query + warp_row, warp_rows = problem.queries - row;
    const int64_t first_row = tile.first_row(problem);
    float scores[1][kTiles][4] = {}, grads[1][kTiles][4] = {};
    multiply_rows(scores, query(), warp_row, key(), problem.exact);
    multiply_rows(grads, grad_out(), warp_row, value(), problem.exact);
    const float scale = cap_scores<false>(scores, problem);
    const float factor = mask_scores<false, false>(scores, scale, true, visible, mask, row, tile.key);
    RowState state[1];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int down = half * 8 + lane_row();
      if (down < warp_rows) {
        state[0].shift[half] = weight_shift(kLog2e * *row_pointer(p.lse, tile.batch, tile.head, row + down));
        state[0].delta[half] = p.delta[first_row + row + down];
      }
    }
    center_gradients<false>(grads, state, problem, first_row, row, tile.key);
    score_gradients(scores, factor, grads, true, state);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] += scores[0][n][i];
    }
  }
};

// Column sums of each warp.
template <int kWarps, int BLOCK_N>
struct ColumnSums {
  float of[kWarps][BLOCK_N];
};

// Scores: FirstOrderScores or SecondOrderScores.
template <typename Scores>
__device__ __forceinline__ void mask_gradient(const typename Scores::Params& p, const MaskGradient& gradient) {
  using T = typename Scores::Type;
  constexpr TileShape kShape = Scores::kShape;
  constexpr int BLOCK_N = kShape.iterated, kTiles = BLOCK_N / 8;
  static_assert(kShape.fragments == 1, "a warp owns 16 rows");
  const Problem& problem = Scores::problem(p);
  const int block_m = static_cast<int>(blockDim.x / 32) * kFragmentRows, warp = uniform_warp();
  const int warp_row = warp * kFragmentRows;
  const ScoreTiles tiles(problem, gradient, block_m, BLOCK_N);

  const auto load = [&](int index, int i) { Scores(block_m, i).load(p, tiles.at(index)); };
  if (tiles.has_first()) load(tiles.first(), 0);
  device::async_copy_commit();

  float sums[kTiles][4] = {};
  pipeline<kShape.stages>(tiles, tiles.first(), load, [&](int index, int i) {
    const ScoreTile tile = tiles.at(index);
    const int row = tile.query + warp_row;
    const HeadMask<T> mask(problem.mask, tile.batch, tile.head);
    const auto live = mask.template live<BLOCK_N, false>({0, problem.keys}, tile.key);
    const Band band = Band::of<false>(problem, row).from(tile.key);
    auto visible = visible_scores<false, false, 1, kTiles>(band, mask, row, problem.queries - row, tile.key, live);
    if (device::any_lane(visible.any())) Scores(block_m, i).accumulate(sums, p, tile, warp_row, visible, mask);
  });

  // epilogue: sums over the rows or columns that the mask is broadcast over
  const bool one_row = gradient.sizes[2] == 1, one_column = gradient.sizes[3] == 1;
  if (one_column) {
    float row_sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) row_sum[i / 2] += sums[n][i];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = team_sum(row_sum[half], 4);
      sums[0][2 * half] = lane_column() == 0 ? sum : 0.0f;
    }
  }
  auto& shared = device::shared_variable<ColumnSums<kShape.warps, BLOCK_N>>();
  if (one_row) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = sums[n][i] + sums[n][i + 2];
        for (int lanes = 4; lanes < 32; lanes *= 2) sum += device::shuffle_xor(sum, lanes);
        if (lane_row() == 0) shared.of[warp][n * 8 + lane_column() + i] = sum;
      }
    }
    device::sync_block();
  }

  const auto store = [&](int row, int column, float value) { tiles.store<T>(gradient, row, column, value); };
  const int first_row = tiles.owned[2] * block_m, first_column = tiles.owned[3] * BLOCK_N;
  if (one_row) {
    for (int column = threadIdx.x; column < (one_column ? 1 : BLOCK_N); column += blockDim.x) {
      float sum = 0.0f;
      for (int i = 0; i < static_cast<int>(blockDim.x / 32); ++i) sum += shared.of[i][column];
      store(0, first_column + column, sum);
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (one_column && (n > 0 || i % 2 != 0 || lane_column() != 0)) continue;
      store(first_row + warp_row + lane_row() + i / 2 * 8, first_column + n * 8 + lane_column() + i % 2, sums[n][i]);
    }
  }
}

template <typename T, int kKeyDim, int kValueDim>
__global__ void __launch_bounds__(32 * FirstOrderScores<T, kKeyDim, kValueDim>::kShape.warps, 1)
    attention_mask_gradient(BackwardParams p, MaskGradient gradient) {
  mask_gradient<FirstOrderScores<T, kKeyDim, kValueDim>>(p, gradient);
}

}  // namespace fastgen::attention
