// The forward-mode derivative of wide heads: tangent.cuh in blocks of eight warps that divide the depth of the products
// of scores and the columns of the result (wide_depth.cuh).
#pragma once

#include "attention/pipeline.cuh"
#include "attention/store.cuh"
#include "attention/tangent_tiles.cuh"
#include "attention/wide_depth.cuh"
#include "common/reduce.cuh"

namespace fastgen::attention {

// Shared memory: partial sums of S and W, later P W M and P M, then the stages of (K, Gk, V, Gv).
template <typename T, int kKeyDim, int kValueDim>
struct WideTangentLayout {
  static constexpr int kThreads = 32 * kWideWarps, BLOCK_N = kWideIterated<T>, kTiles = BLOCK_N / 8;
  static constexpr int kKeyColumns = kKeyDim / kWideWarps, kValueColumns = kValueDim / kWideWarps;
  using Exchange = WideExchange<T, 2>;
  using Keys = KeyTangentTile<T, kKeyDim, kValueDim>;

  static __device__ __forceinline__ Keys keys(int i) {
    return {device::dynamic_shared() + Exchange::kBytes + i * BLOCK_N * Keys::kBytes, BLOCK_N};
  }
};

// S and W of a warp's columns: from ``column`` on, of which there are ``columns``. ``Owned``: Q and Gq, or transposed K
// and Gk; ``right`` and ``tangent_right``: the other operand.
template <typename T, int kColumns, int kTiles, int kWidth>
__device__ __forceinline__ void multiply_scores_and_direction(float (&scores)[kTiles][4], float (&direction)[kTiles][4],
                                                              const OwnedRows<T, kColumns>& left,
                                                              const OwnedRows<T, kColumns>& tangent_left,
                                                              bool has_tangent_left, const Tile<T, kWidth>& right,
                                                              const Tile<T, kWidth>& tangent_right,
                                                              bool has_tangent_right, int column, bool exact) {
#pragma unroll
  for (int strip = 0; strip < kColumns / Strip<T>::kColumns; ++strip) {
    const Strip<T> of_right(right, column + strip * Strip<T>::kColumns, exact);
    of_right.multiply(scores, left, strip, exact);
    if (has_tangent_left) of_right.multiply(direction, tangent_left, strip, exact);
    if (has_tangent_right) {
      Strip<T>(tangent_right, column + strip * Strip<T>::kColumns, exact).multiply(direction, left, strip, exact);
    }
  }
}

// gridDim = (query tiles of all heads).
template <typename T, int kKeyDim, int kValueDim>
__global__ void __launch_bounds__(WideTangentLayout<T, kKeyDim, kValueDim>::kThreads, 1)
    attention_tangent_wide(TangentParams p) {
  using Layout = WideTangentLayout<T, kKeyDim, kValueDim>;
  using Exchange = typename Layout::Exchange;
  constexpr int BLOCK_M = kWideOwned, BLOCK_N = Layout::BLOCK_N, kTiles = Layout::kTiles;
  using Tiles = KeyTiles<T, BLOCK_N, false>;
  const Problem& problem = p.problem;
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int key_column = warp * Layout::kKeyColumns, value_column = warp * Layout::kValueColumns;
  const QueryBlock block(problem, blockIdx.x, BLOCK_M, MayPack<true>{});
  if (block.rows() <= 0) return;
  const Tiles tiles(problem, block);
  const HeadMask<T> mask_tangent(p.tangents.mask, block.batch, block.head);
  const int row = block.queries.begin;

  const auto load_keys = [&](const typename Tiles::Index& tile, int i) {
    copy_tile(Layout::keys(i), p, p.tangents, block.key_batch, block.key_head, tile.key(), 0,
              [&](int row) { return tile.is_live(row); });
  };
  const typename Tiles::Index first = tiles.first();
  load_keys(first, 0);
  device::async_copy_commit();
  OwnedRows<T, Layout::kKeyColumns> query, tangent_query;
  query.load(row_pointer<T>(p.query, block.batch, block.head, row) + key_column, p.query.row, block.rows(),
             problem.key_dim - key_column);
  if (p.tangents.query.data != nullptr) {
    tangent_query.load(row_pointer<T>(p.tangents.query, block.batch, block.head, row) + key_column,
                       p.tangents.query.row, block.rows(), problem.key_dim - key_column);
  }

  const ScorePlace<T> place;
  const Band window = Band::of<false>(problem, row);
  float shift = INFINITY;
  if (place.row < block.rows()) {
    shift = weight_shift(kLog2e * *row_pointer(p.lse, block.batch, block.head, row + place.row));
  }
  float sums[1][Layout::kValueColumns / 8][4] = {}, mean = 0.0f;
  pipeline(p.stages, tiles, first, load_keys, [&](const typename Tiles::Index& tile, int stage) {
    // scores
    const auto keys = Layout::keys(stage);
    float scores[kTiles][4] = {}, direction[kTiles][4] = {};
    if (key_column < problem.key_dim) {
      multiply_scores_and_direction(scores, direction, query, tangent_query, p.tangents.query.data != nullptr,
                                    keys.key(), keys.tangent_key(), p.tangents.key.data != nullptr, key_column,
                                    problem.exact);
    }
    Exchange::store(0, scores), Exchange::store(1, direction);
    device::sync_block();
    // softmax: P W M and P M
    if (place.exists()) {
      const Band band = window.from(tile.key());
      const bool inside =
          place.row < block.rows() && tile.is_live(place.column) && band.contains(place.row, place.column);
      WideScore score(Exchange::sum(0), Exchange::sum(1), problem, inside, tiles.mask, mask_tangent, row + place.row,
                      tile.key() + place.column, shift);
      if (score.clears && score.weight == 0.0f) score.direction = 0.0f;
      score.direction *= score.weight;
      mean += score.direction;
      if (problem.dropout.seeds != nullptr) {
        const float factor =
            HeadDropout(problem, block.first_row).factor_of(row + place.row, tile.key() + place.column);
        score.weight *= factor, score.direction *= factor;
      }
      device::sync_warp();  // the partial sums have been read
      Exchange::store_weight(0, score.direction), Exchange::store_weight(1, score.weight);
      Exchange::store_attended(score.visible);
    }
    device::sync_block();
    // accumulate
    if (value_column < problem.value_dim) {
      const Attended<T> attended(Exchange::words());
      attended.multiply(sums, Exchange::weights(0, problem.exact), keys.value(), value_column, problem.exact);
      if (p.tangents.value.data != nullptr) {
        attended.multiply(sums, Exchange::weights(1, problem.exact), keys.tangent_value(), value_column, problem.exact);
      }
    }
  });

  // epilogue: the means of the rows, [eight columns][row]
  mean = team_sum(mean, 8);
  device::sync_block();
  float* const means = Exchange::part(0, 0);
  if (place.exists() && threadIdx.x % 8 == 0) means[threadIdx.x / 8] = mean;
  device::sync_block();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int down = half * 8 + lane_row();
    float of_row = 0.0f;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) of_row += means[tile * kWideOwned + down];
    if (down >= block.rows()) continue;
    if (warp == 0 && lane_column() == 0) {
      *row_pointer(p.tangent_lse, block.batch, block.head, row + down) = of_row;
    }
    const T* out = row_pointer<T>(p.out, block.batch, block.head, row + down) + value_column;
#pragma unroll
    for (int n = 0; n < Layout::kValueColumns / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = n * 8 + lane_column() + e;
        if (value_column + column < problem.value_dim) {
          sums[0][n][2 * half + e] -= of_row * device::to_float(out[column]);
        }
      }
    }
  }
  const float ones[1][2] = {{1.0f, 1.0f}};
  store_rows(row_pointer<T>(p.tangent_out, block.batch, block.head, row) + value_column, p.tangent_out.row,
             block.rows(), problem.value_dim - value_column, ones, sums);
}

}  // namespace fastgen::attention
