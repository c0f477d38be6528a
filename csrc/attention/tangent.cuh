// The derivative of attention in a direction, in one pass over the keys with O(N) memory: with P = 2^(S - lse), W the
// direction of the scores and M dropout,
//   w = rowsum(P W)      out' = (P (W - w) M) V + (P M) Gv = (P W M) V + (P M) Gv - w out      lse' = w
// where out and lse are those of the forward pass. As forward: a block owns rows of the queries, keys pass by.
#pragma once

#include "attention/dropout.cuh"
#include "attention/sides.cuh"
#include "attention/softmax.cuh"
#include "attention/store.cuh"
#include "common/reduce.cuh"
#include "device/barrier.cuh"
#include "device/shared.cuh"

namespace fastgen::attention {

template <typename T, int kKeyDim, int kValueDim>
struct TangentLayout {
  static constexpr Shape kShape = tangent_shape({kKeyDim, kValueDim}, sizeof(T));
  static_assert(kShape.fragments == 1, "a warp owns 16 rows");
  static constexpr int kThreads = 32 * kShape.warps, kColumns = smaller(kValueDim, kShape.columns);
  using Queries = QuerySide<T, kKeyDim, 0>;
  using Keys = KeySide<T, kKeyDim, kColumns>;

  static __device__ __forceinline__ Queries queries() {
    return {device::dynamic_shared(), static_cast<int>(blockDim.x / 32) * kFragmentRows};
  }
  static __device__ __forceinline__ Keys keys(int step) {
    const int stage = step % kShape.stages * kShape.step * Keys::kBytes;
    return {device::dynamic_shared() + queries().rows * Queries::kBytes + stage, kShape.step};
  }
};

// blockIdx.y: which columns of the values.
template <typename T, int kKeyDim, int kValueDim, bool kPlain>
__global__ void __launch_bounds__(TangentLayout<T, kKeyDim, kValueDim>::kThreads, 1)
    attention_tangent(TangentParams p) {
  using Layout = TangentLayout<T, kKeyDim, kValueDim>;
  constexpr Shape kShape = Layout::kShape;
  constexpr int kTiles = kShape.step / 8, kColumns = Layout::kColumns;
  using Steps = KeySteps<T, kShape.step, kPlain>;
  const Problem& problem = p.problem;
  const auto queries = Layout::queries();
  const int warp_row = static_cast<int>(threadIdx.x / 32) * kFragmentRows;
  const int first_column = static_cast<int>(blockIdx.y) * kColumns;
  const QueryTile at(problem, blockIdx.x, queries.rows);
  const Steps steps(problem, at);
  const HeadMask<T> mask_tangent(p.tangents.mask, at.batch, at.head);
  const int row = at.queries.begin + warp_row, warp_count = at.count() - warp_row;

  const auto copy_step = [&](const typename Steps::Step& step, int count) {
    copy_side(Layout::keys(count), p, p.tangents, at.batch, at.key_head, step.index * kShape.step, first_column,
              [&](int row) { return (step.live >> row & 1) != 0; });
  };
  copy_side(queries, p, p.tangents, at.batch, at.head, at.queries.begin, [&](int row) { return row < at.count(); });
  auto step = steps.first();
  copy_step(step, 0);
  device::async_copy_commit();

  float lse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int down = half * 8 + lane_row();
    lse[half] = down < warp_count ? kLog2e * read(p.lse, at.batch, at.head, row + down) : -INFINITY;
  }
  float sums[1][kColumns / 8][4] = {}, mean[2] = {0.0f, 0.0f};
  const float scale = problem.scale;
  bool more = true;
  for (int count = 0; more; ++count) {
    device::async_copy_wait<0>();
    device::sync_block();
    const auto here = step;
    step = steps.after(here);
    more = steps.has(step);
    if (kShape.stages > 1) {
      if (more) copy_step(step, count + 1);
      device::async_copy_commit();
    }
    const int key = here.index * kShape.step;
    const bool all = steps.all_visible(problem, at, here);
    Visible<1, kTiles> seen;
    if (!all) seen = visible<kPlain, false, 1, kTiles>(problem, steps.mask, row, warp_count, key, here.live);
    if (warp_count > 0 && (all || device::any_lane(seen.bits != 0))) {
      const auto keys = Layout::keys(count);
      float scores[1][kTiles][4] = {}, direction[1][kTiles][4] = {};
      multiply_rows(scores, queries.query(), warp_row, keys.key(), problem.exact);
      multiply_direction(direction, queries, warp_row, keys, p.tangents, problem.exact);
      mask_scores<kPlain, false>(scores, scale * kLog2e, seen, steps.mask, row, key);
      finish_direction<false>(direction, scale, seen, mask_tangent, row, key);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float factors[4] = {1.0f, 1.0f, 1.0f, 1.0f};
        if constexpr (!kPlain) {
          if (problem.dropout.seeds != nullptr) {
            HeadDropout(problem, at.first_of_head).factors(factors, row, key + tile * 8);
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float now = weight(scores[0][tile][i], lse[i / 2]);
          const float along = now == 0.0f ? 0.0f : now * direction[0][tile][i];
          mean[i / 2] += along;
          scores[0][tile][i] = now * factors[i];
          direction[0][tile][i] = along * factors[i];
        }
      }
      const uint32_t live = kPlain || all ? 0 : seen.columns();
      const bool holes = !kPlain && !all;
      multiply_weights<T>(sums, direction, keys.value(), 0, problem.exact, holes, live);
      if (p.tangents.value.data != nullptr) {
        multiply_weights<T>(sums, scores, keys.tangent_value(), 0, problem.exact, holes, live);
      }
    }
    if (kShape.stages == 1) {
      device::sync_block();
      if (more) copy_step(step, count + 1);
      device::async_copy_commit();
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    mean[half] = team_sum(mean[half], 4);
    const int down = half * 8 + lane_row();
    if (down >= warp_count) continue;
    if (lane_column() == 0 && blockIdx.y == 0) {
      p.tangent_lse
          .data[at.batch * p.tangent_lse.batch + at.head * p.tangent_lse.head + (row + down) * p.tangent_lse.row] =
          mean[half];
    }
    const T* out = rows_of<T>(p.out, at.batch, at.head, row + down) + first_column;
#pragma unroll
    for (int tile = 0; tile < kColumns / 8; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = tile * 8 + lane_column() + i;
        if (first_column + column < problem.value_dim) {
          sums[0][tile][2 * half + i] -= mean[half] * device::to_float(out[column]);
        }
      }
    }
  }
  const float ones[1][2] = {{1.0f, 1.0f}};
  store_rows(rows_of<T>(p.tangent_out, at.batch, at.head, row) + first_column, p.tangent_out.row, warp_count,
             problem.value_dim - first_column, ones, sums);
}

}  // namespace fastgen::attention
