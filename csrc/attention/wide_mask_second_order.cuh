// The second-order gradient of a float mask of wide heads: mask_second_order.cuh, with the scores of wide_depth.cuh. A
// block owns a tile of the mask; each thread sums one score over the tiles that it is broadcast to.
#pragma once

#include "attention/mask_gradient.cuh"
#include "attention/wide_second_order.cuh"

namespace fastgen::attention {

// Shared memory: as attention_second_order_query_wide, one stage. gridDim = (tiles of the mask, splits).
template <typename T, int kKeyDim, int kValueDim>
__global__ void __launch_bounds__(WideSecondOrderLayout<T, kKeyDim, kValueDim>::kThreads, 1)
    attention_mask_second_order_wide(SecondOrderParams p, MaskGradient gradient) {
  using Layout = WideSecondOrderLayout<T, kKeyDim, kValueDim>;
  using Exchange = typename Layout::Exchange;
  using Keys = typename Layout::Keys;
  constexpr int BLOCK_M = kWideOwned, BLOCK_N = Layout::kIterated;
  const Problem& problem = p.first.problem;
  const ScoreTiles tiles(problem, gradient, BLOCK_M, BLOCK_N);

  const auto load_keys = [&](int index, int i) {
    const ScoreTile tile = tiles.at(index);
    copy_tile(Layout::template iterated<Keys>(i), p.first, p.tangents, tile.batch, tile.key_head(problem), tile.key, 0,
              [&](int row) { return tile.key + row < problem.keys; });
  };
  if (tiles.has_first()) load_keys(tiles.first(), 0);
  device::async_copy_commit();

  const ScorePlace<T> place;
  float sum = 0.0f;
  pipeline<1>(tiles, tiles.first(), load_keys, [&](int index, int stage) {
    // scores
    const ScoreTile tile = tiles.at(index);
    const int rows = smaller(problem.queries - tile.query, BLOCK_M);
    const WideQueries<T, kKeyDim, kValueDim> queries(p, tile.batch, tile.head, tile.query, rows);
    queries.store_scores(p, Layout::template iterated<Keys>(stage));
    device::sync_block();
    if (!place.exists()) return;
    // softmax
    const int query = tile.query + place.row, key = tile.key + place.column;
    const HeadMask<T> mask(problem.mask, tile.batch, tile.head), mask_tangent(p.tangents.mask, tile.batch, tile.head);
    const Band band = Band::of<false>(problem, tile.query).from(tile.key);
    const bool inside = place.row < rows && key < problem.keys && band.contains(place.row, place.column);
    const int64_t first_row = tile.first_row(problem);
    SecondOrderRow of_row;
    if (place.row < rows) {
      of_row = {weight_shift(kLog2e * *row_pointer(p.first.lse, tile.batch, tile.head, query)),
                p.first.delta[first_row + query], *row_pointer(p.tangent_lse, tile.batch, tile.head, query),
                p.second_delta[first_row + query]};
    }
    const WideScore score(Exchange::sum(0), Exchange::sum(1), problem, inside, mask, mask_tangent, query, key,
                          of_row.shift);
    const float factor =
        problem.dropout.seeds == nullptr ? 1.0f : HeadDropout(problem, first_row).factor_of(query, key);
    sum += WideGradients(score, Exchange::sum(2), Exchange::sum(3), factor, of_row).second;
  });

  // epilogue: sums over the rows or columns that the mask is broadcast over, each in one order. A thread overwrites a
  // partial score that only it has read.
  float* const sums = Exchange::part(0, 0);
  if (place.exists()) sums[threadIdx.x] = sum;
  device::sync_block();
  const bool one_row = gradient.sizes[2] == 1, one_column = gradient.sizes[3] == 1;
  const int down = one_row ? 1 : BLOCK_M, across = one_column ? 1 : BLOCK_N;
  if (place.row >= down || place.column >= across) return;
  float total = 0.0f;
  for (int row = place.row; row < (one_row ? BLOCK_M : place.row + 1); ++row) {
    for (int column = place.column; column < (one_column ? BLOCK_N : place.column + 1); ++column) {
      total += sums[(column / 8 * BLOCK_M + row) * 8 + column % 8];
    }
  }
  tiles.template store<T>(gradient, tiles.owned[2] * BLOCK_M + place.row, tiles.owned[3] * BLOCK_N + place.column,
                          total);
}

}  // namespace fastgen::attention
