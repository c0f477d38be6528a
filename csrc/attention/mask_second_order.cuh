// The second-order gradient of a float mask: dS2 of second_order.cuh, summed as in mask_gradient.cuh, which has the
// algorithm and the layout of blocks and warps.
#pragma once

#include "attention/mask_gradient.cuh"
#include "attention/second_order.cuh"

namespace fastgen::attention {

// Second order: dS2 of a tile. Shared memory: (Q, Gq, dO), (K, Gk, V, Gv), one stage.
template <typename T, int kKeyDim, int kValueDim>
struct SecondOrderScores {
  using Params = SecondOrderParams;
  using Type = T;
  static constexpr TileShape kShape = mask_second_order_shape({kKeyDim, kValueDim}, sizeof(T));
  static constexpr int BLOCK_N = kShape.iterated, kTiles = BLOCK_N / 8;
  using Queries = QueryTangentTile<T, kKeyDim, kValueDim>;
  using Keys = KeyTangentTile<T, kKeyDim, kValueDim>;
  static_assert(kShape.stages == 1, "the layout has one stage");
  Queries queries;
  Keys keys;

  __device__ __forceinline__ SecondOrderScores(int block_m, int /*i*/)
      : queries{device::dynamic_shared(), block_m},
        keys{device::dynamic_shared() + block_m * Queries::kBytes, BLOCK_N} {}
  static __device__ __forceinline__ const Problem& problem(const Params& p) { return p.first.problem; }

  __device__ __forceinline__ void load(const Params& p, const ScoreTile& tile) const {
    const Problem& problem = p.first.problem;
    copy_tile(queries, p.first, p.tangents, tile.batch, tile.head, tile.query,
              [&](int row) { return tile.query + row < problem.queries; });
    copy_tile(keys, p.first, p.tangents, tile.batch, tile.key_head(problem), tile.key, 0,
              [&](int row) { return tile.key + row < problem.keys; });
  }

  __device__ __forceinline__ void accumulate(float (&sums)[kTiles][4], const Params& p, const ScoreTile& tile,
                                             int warp_row, Visible<1, kTiles>& visible, const HeadMask<T>& mask) const {
    const Problem& problem = p.first.problem;
    const int row = tile.query + warp_row, warp_rows = problem.queries - row;
    const int64_t first_row = tile.first_row(problem);
    const HeadMask<T> mask_tangent(p.tangents.mask, tile.batch, tile.head);
    SecondOrderTile<T, kTiles> scores(p, queries, warp_row, keys, true, visible, mask, mask_tangent, row, tile.key);
    SecondOrderRow rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + half * 8 + lane_row();
      if (half * 8 + lane_row() < warp_rows) {
        const float lse = kLog2e * *row_pointer(p.first.lse, tile.batch, tile.head, at);
        rows[half] = {weight_shift(lse), p.first.delta[first_row + at],
                      *row_pointer(p.tangent_lse, tile.batch, tile.head, at), p.second_delta[first_row + at]};
      }
    }
    scores.softmax(problem, first_row, rows, true, row, tile.key);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] += scores.direction[0][n][i];
    }
  }
};

template <typename T, int kKeyDim, int kValueDim>
__global__ void __launch_bounds__(32 * SecondOrderScores<T, kKeyDim, kValueDim>::kShape.warps, 1)
    attention_mask_second_order(SecondOrderParams p, MaskGradient gradient) {
  mask_gradient<SecondOrderScores<T, kKeyDim, kValueDim>>(p, gradient);
}

}  // namespace fastgen::attention
