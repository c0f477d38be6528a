// out = softmax(scale Q K^T + mask) V and the rows' logsumexp, in one pass over the keys with O(N) memory. (Dao,
// "FlashAttention-2", 2023.)
//
// A block owns rows of one head's queries, a warp 16 or 32 of them. Keys and values pass by in steps, copied while the
// step before is worked on; then, where rows are short, the block goes on to the next rows.
#pragma once

#include "attention/dropout.cuh"
#include "attention/position.cuh"
#include "attention/softmax.cuh"
#include "attention/store.cuh"
#include "device/barrier.cuh"
#include "device/shared.cuh"

namespace fastgen::attention {

template <typename T, int kKeyDim, int kValueDim, bool kPlain>
struct ForwardLayout {
  static constexpr Dims kDims = {kKeyDim, kValueDim};
  static constexpr Shape kShape = forward_shape(kDims, sizeof(T), kPlain);
  static constexpr int kThreads = 32 * kShape.warps, kWarpRows = kShape.fragments * kFragmentRows;
  static constexpr int kColumns = smaller(kValueDim, kShape.columns);
  static constexpr int kBuffers = query_buffers(kDims, sizeof(T), kPlain);
  using Query = Tile<T, kKeyDim>;
  using Key = Tile<T, kKeyDim>;
  using Value = Tile<T, kColumns>;
  static constexpr int kKeyBytes = kShape.step * row_bytes(kKeyDim, sizeof(T));
  static constexpr int kStageBytes = kKeyBytes + kShape.step * row_bytes(kColumns, sizeof(T));

  static __device__ __forceinline__ int block_rows() { return static_cast<int>(blockDim.x / 32) * kWarpRows; }
  // Copies are numbered as they come: steps in stages, row tiles in buffers.
  static __device__ __forceinline__ Query query(int item) {
    const int bytes = block_rows() * row_bytes(kKeyDim, sizeof(T));
    return {reinterpret_cast<T*>(device::dynamic_shared() + item % kBuffers * bytes)};
  }
  static __device__ __forceinline__ unsigned char* stage(int step) {
    const int queries = kBuffers * block_rows() * row_bytes(kKeyDim, sizeof(T));
    return device::dynamic_shared() + queries + step % kShape.stages * kStageBytes;
  }
  static __device__ __forceinline__ Key key(int step) { return {reinterpret_cast<T*>(stage(step))}; }
  static __device__ __forceinline__ Value value(int step) { return {reinterpret_cast<T*>(stage(step) + kKeyBytes)}; }
};

// kPlain: no mask and no dropout.
template <typename T, int kKeyDim, int kValueDim, bool kPlain>
__global__ void __launch_bounds__(ForwardLayout<T, kKeyDim, kValueDim, kPlain>::kThreads, 1)
    attention_forward(ForwardParams p) {
  using Layout = ForwardLayout<T, kKeyDim, kValueDim, kPlain>;
  constexpr Shape kShape = Layout::kShape;
  constexpr int kFragments = kShape.fragments, kTiles = kShape.step / 8, kColumns = Layout::kColumns;
  using Steps = KeySteps<T, kShape.step, kPlain>;
  const Problem& problem = p.problem;
  const int rows = Layout::block_rows(), warp_row = static_cast<int>(threadIdx.x / 32) * Layout::kWarpRows;
  const int first_column = static_cast<int>(blockIdx.y) * kColumns;
  const float scale = problem.scale * kLog2e;

  const auto copy_queries = [&](const QueryTile& at, int item) {
    copy_rows(Layout::query(item), rows, rows_of<T>(p.query, at.batch, at.head, at.queries.begin), p.query.row,
              problem.key_dim, [&](int row) { return row < at.count(); });
  };
  const auto copy_step = [&](const QueryTile& at, const typename Steps::Step& step, int count) {
    const auto there = [&](int row) { return (step.live >> row & 1) != 0; };
    const int key = step.index * kShape.step;
    copy_rows(Layout::key(count), kShape.step, rows_of<T>(p.key, at.batch, at.key_head, key), p.key.row,
              problem.key_dim, there);
    copy_rows(Layout::value(count), kShape.step, rows_of<T>(p.value, at.batch, at.key_head, key) + first_column,
              p.value.row, problem.value_dim - first_column, there);
  };

  const int64_t tiles = ceil_div(problem.queries, rows) * problem.batch * problem.heads;
  const int64_t first_item = static_cast<int64_t>(blockIdx.x) * (Layout::kBuffers == 1 ? 1 : p.items);
  int items = 1;
  if (Layout::kBuffers > 1) items = static_cast<int>(tiles - first_item < p.items ? tiles - first_item : p.items);
  typename Steps::Step step;
  // Queries and first step of a row tile; they are copy number ``count`` of the steps.
  const auto copy_item = [&](int item, int count) {
    const QueryTile at(problem, first_item + item, rows);
    step = Steps(problem, at).first();
    copy_queries(at, item);
    copy_step(at, step, count);
  };
  copy_item(0, 0);
  device::async_copy_commit();

  int count = 0;  // of steps
  for (int item = 0; item < items; ++item) {
    const QueryTile at(problem, first_item + item, rows);
    const Steps steps(problem, at);
    const int warp_count = at.count() - warp_row;  // rows of this warp that are there
    Softmax softmax[kFragments];
    float out[kFragments][kColumns / 8][4] = {};
    bool more = true;
    while (more) {
      device::async_copy_wait<0>();
      // This step's tiles are there, and everyone is done with the step before.
      device::sync_block();
      const auto here = step;
      step = steps.after(here);
      more = steps.has(step);
      const auto copy_next = [&] {
        if (more) {
          copy_step(at, step, count + 1);
        } else if (item + 1 < items) {
          copy_item(item + 1, count + 1);
        }
        device::async_copy_commit();
      };
      if (kShape.stages > 1) copy_next();

      const int row = at.queries.begin + warp_row, key = here.index * kShape.step;
      const bool all = steps.all_visible(problem, at, here);
      Visible<kFragments, kTiles> seen;
      if (!all) {
        seen = visible<kPlain, false, kFragments, kTiles>(problem, steps.mask, row, warp_count, key, here.live);
      }
      if (warp_count > 0 && (all || device::any_lane(seen.bits != 0))) {
        float scores[kFragments][kTiles][4] = {};
        multiply_rows(scores, Layout::query(item), warp_row, Layout::key(count), problem.exact);
        mask_scores<kPlain, false>(scores, scale, seen, steps.mask, row, key);

#pragma unroll
        for (int m = 0; m < kFragments; ++m) {
          float shrink[2];
          softmax[m].step(scores[m], shrink);
          // Once the largest score has been seen nothing shrinks any more; but a wide output leaves no registers to
          // ask.
          constexpr bool kAlways = kFragments * kColumns > 128;
          if (kAlways || device::any_lane(shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
            for (auto& sums : out[m]) {
#pragma unroll
              for (int i = 0; i < 4; ++i) sums[i] *= shrink[i / 2];
            }
          }
        }
        if constexpr (!kPlain) {
          if (problem.dropout.seeds != nullptr) {
            const HeadDropout dropout(problem, at.first_of_head);
#pragma unroll
            for (int m = 0; m < kFragments; ++m) {
#pragma unroll
              for (int tile = 0; tile < kTiles; ++tile) {
                float factors[4];
                dropout.factors(factors, row + m * kFragmentRows, key + tile * 8);
#pragma unroll
                for (int i = 0; i < 4; ++i) scores[m][tile][i] *= factors[i];
              }
            }
          }
        }
        // A value that none of the rows sees may be anything, and zero times that need not be zero.
        const uint32_t live = kPlain || all ? 0 : seen.columns();
        multiply_weights<T>(out, scores, Layout::value(count), 0, problem.exact, !kPlain && !all, live);
      }
      if (kShape.stages == 1) {
        device::sync_block();
        copy_next();
      }
      ++count;
    }

    float inverse[kFragments][2];
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
      softmax[m].finish();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        inverse[m][half] = softmax[m].inverse(half);
        const int row = m * kFragmentRows + half * 8 + lane_row();
        if (row < warp_count && lane_column() == 0 && blockIdx.y == 0) {
          p.lse.data[at.batch * p.lse.batch + at.head * p.lse.head + (at.queries.begin + warp_row + row) * p.lse.row] =
              softmax[m].lse(half);
        }
      }
    }
    store_rows(rows_of<T>(p.out, at.batch, at.head, at.queries.begin + warp_row) + first_column, p.out.row, warp_count,
               problem.value_dim - first_column, inverse, out);
  }
}

}  // namespace fastgen::attention
