// The gradient of a float mask, of second order: dS2 of second_order.cuh, summed as in mask_gradient.cuh.
#pragma once

#include "attention/mask_gradient.cuh"
#include "attention/second_order.cuh"

namespace fastgen::attention {

// The gradient of a tile of scores, of second order.
template <typename T, int kKeyDim, int kValueDim>
struct SecondScores {
  using Params = SecondOrderParams;
  using Type = T;
  static constexpr Shape kShape = mask_second_order_shape({kKeyDim, kValueDim}, sizeof(T));
  static constexpr int kTiles = kShape.step / 8;
  using Queries = QuerySide<T, kKeyDim, kValueDim>;
  using Keys = KeySide<T, kKeyDim, kValueDim>;
  static_assert(kShape.stages == 1, "items have one place");
  Queries queries;
  Keys keys;

  __device__ __forceinline__ SecondScores(int block_rows, int /*number*/)
      : queries{device::dynamic_shared(), block_rows},
        keys{device::dynamic_shared() + block_rows * Queries::kBytes, kShape.step} {}
  static __device__ __forceinline__ const Problem& problem(const Params& p) { return p.first.problem; }

  __device__ __forceinline__ void copy(const Params& p, const MaskItem& item) const {
    const Problem& problem = p.first.problem;
    copy_side(queries, p.first, p.tangents, item.batch, item.head, item.query,
              [&](int row) { return item.query + row < problem.queries; });
    copy_side(keys, p.first, p.tangents, item.batch, item.key_head(problem), item.key, 0,
              [&](int row) { return item.key + row < problem.keys; });
  }

  __device__ __forceinline__ void add(float (&sums)[kTiles][4], const Params& p, const MaskItem& item, int warp_row,
                                      Visible<1, kTiles>& seen, const HeadMask<T>& mask) const {
    const Problem& problem = p.first.problem;
    const int row = item.query + warp_row, warp_count = problem.queries - row;
    const int64_t first_of_head = item.first_of_head(problem);
    const HeadMask<T> mask_tangent(p.tangents.mask, item.batch, item.head);
    SecondProducts<T, kTiles> tile(p, queries, warp_row, keys, seen, mask, mask_tangent, row, item.key);
    SecondRow rows[2] = {{-INFINITY, 0.0f, 0.0f, 0.0f}, {-INFINITY, 0.0f, 0.0f, 0.0f}};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + half * 8 + lane_row();
      if (half * 8 + lane_row() < warp_count) {
        rows[half] = {kLog2e * read(p.first.lse, item.batch, item.head, at), p.first.delta[first_of_head + at],
                      read(p.tangent_lse, item.batch, item.head, at), p.second_delta[first_of_head + at]};
      }
    }
    tile.finish(problem, first_of_head, rows, row, item.key);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] += tile.direction[0][i][j];
    }
  }
};

template <typename T, int kKeyDim, int kValueDim>
__global__ void __launch_bounds__(32 * SecondScores<T, kKeyDim, kValueDim>::kShape.warps, 1)
    attention_mask_second_order(SecondOrderParams p, MaskGradient gradient) {
  mask_gradient<SecondScores<T, kKeyDim, kValueDim>>(p, gradient);
}

}  // namespace fastgen::attention
