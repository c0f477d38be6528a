// The gradient of a float mask: dS, summed over what the mask is broadcast to. A block owns a tile of the mask, which
// is as large as all rows or columns where it is broadcast over them, and goes over its part of the scores; so nothing
// of the size of the scores is stored, and each sum has one order.
#pragma once

#include "attention/backward.cuh"
#include "attention/mask_result.cuh"

namespace fastgen::attention {

// A tile of the scores: its queries and its keys.
struct MaskItem {
  int batch, head, query, key;

  __device__ __forceinline__ int key_head(const Problem& p) const { return head / (p.heads / p.key_heads); }
  __device__ __forceinline__ int64_t first_of_head(const Problem& p) const {
    return (static_cast<int64_t>(batch) * p.heads + head) * p.queries;
  }
};

// The gradient of a tile of scores, of first order: dS. Stage: where the item's tiles are.
template <typename T, int kKeyDim, int kValueDim>
struct FirstScores {
  using Params = BackwardParams;
  using Type = T;
  static constexpr Shape kShape = mask_shape({kKeyDim, kValueDim}, sizeof(T));
  static constexpr int kTiles = kShape.step / 8;
  static constexpr int kKeyRow = row_bytes(kKeyDim, sizeof(T)), kValueRow = row_bytes(kValueDim, sizeof(T));
  using KeyDim = Tile<T, kKeyDim>;
  using ValueDim = Tile<T, kValueDim>;
  unsigned char* stage;
  int rows;

  __device__ __forceinline__ FirstScores(int block_rows, int number)
      : stage(device::dynamic_shared() + number % kShape.stages * (block_rows + kShape.step) * (kKeyRow + kValueRow)),
        rows(block_rows) {}
  static __device__ __forceinline__ const Problem& problem(const Params& p) { return p.problem; }
  __device__ __forceinline__ KeyDim key() const { return {reinterpret_cast<T*>(stage)}; }
  __device__ __forceinline__ ValueDim value() const { return {reinterpret_cast<T*>(stage + kShape.step * kKeyRow)}; }
  __device__ __forceinline__ KeyDim query() const {
    return {reinterpret_cast<T*>(stage + kShape.step * (kKeyRow + kValueRow))};
  }
  __device__ __forceinline__ ValueDim grad_out() const {
    return {reinterpret_cast<T*>(stage + kShape.step * (kKeyRow + kValueRow) + rows * kKeyRow)};
  }

  __device__ __forceinline__ void copy(const Params& p, const MaskItem& item) const {
    const Problem& problem = p.problem;
    const int key_head = item.key_head(problem);
    const auto row_there = [&](int row) { return item.query + row < problem.queries; };
    const auto key_there = [&](int row) { return item.key + row < problem.keys; };
    copy_rows(query(), rows, rows_of<T>(p.query, item.batch, item.head, item.query), p.query.row, problem.key_dim,
              row_there);
    copy_rows(grad_out(), rows, rows_of<T>(p.grad_out, item.batch, item.head, item.query), p.grad_out.row,
              problem.value_dim, row_there);
    copy_rows(key(), kShape.step, rows_of<T>(p.key, item.batch, key_head, item.key), p.key.row, problem.key_dim,
              key_there);
    copy_rows(value(), kShape.step, rows_of<T>(p.value, item.batch, key_head, item.key), p.value.row, problem.value_dim,
              key_there);
  }

  __device__ __forceinline__ void add(float (&sums)[kTiles][4], const Params& p, const MaskItem& item, int warp_row,
                                      Visible<1, kTiles>& seen, const HeadMask<T>& mask) const {
    const Problem& problem = p.problem;
    const int row = item.query + warp_row, warp_count = problem.queries - row;
    const int64_t first_of_head = item.first_of_head(problem);
    float scores[1][kTiles][4] = {}, grads[1][kTiles][4] = {};
    multiply_rows(scores, query(), warp_row, key(), problem.exact);
    multiply_rows(grads, grad_out(), warp_row, value(), problem.exact);
    mask_scores<false, false>(scores, problem.scale * kLog2e, seen, mask, row, item.key);
    RowState state[1];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int down = half * 8 + lane_row();
      const bool there = down < warp_count;
      state[0].lse[half] = there ? kLog2e * read(p.lse, item.batch, item.head, row + down) : -INFINITY;
      state[0].delta[half] = there ? p.delta[first_of_head + row + down] : 0.0f;
    }
    score_gradients<false>(scores, grads, state, problem, first_of_head, row, item.key);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[tile][i] += scores[0][tile][i];
    }
  }
};

// Sums of a block's rows and columns, from warp to warp.
template <int kWarps, int kStep>
struct MaskSums {
  float of[kWarps][kStep];
};

template <typename Scores>
__device__ __forceinline__ void mask_gradient(const typename Scores::Params& p, const MaskGradient& gradient) {
  using T = typename Scores::Type;
  constexpr Shape kShape = Scores::kShape;
  constexpr int kTiles = kShape.step / 8, kStep = kShape.step;
  static_assert(kShape.fragments == 1, "a warp owns 16 rows");
  const Problem& problem = Scores::problem(p);
  const int rows = static_cast<int>(blockDim.x / 32) * kFragmentRows, warp = static_cast<int>(threadIdx.x / 32);
  const int warp_row = warp * kFragmentRows;
  const int row_tiles = static_cast<int>(ceil_div(problem.queries, rows));
  const int key_tiles = static_cast<int>(ceil_div(problem.keys, kStep));

  // What the block owns, and how much of each dim it goes over.
  const bool one_row = gradient.sizes[2] == 1, one_column = gradient.sizes[3] == 1;
  const int owned[4] = {gradient.sizes[0], gradient.sizes[1], one_row ? 1 : row_tiles, one_column ? 1 : key_tiles};
  int own[4];
  int64_t rest = blockIdx.x;
  for (int i = 3; i >= 0; --i) own[i] = static_cast<int>(rest % owned[i]), rest /= owned[i];
  const int over[4] = {gradient.sizes[0] == 1 ? problem.batch : 1, gradient.sizes[1] == 1 ? problem.heads : 1,
                       one_row ? row_tiles : 1, one_column ? key_tiles : 1};
  const int64_t all_items = int64_t{over[0]} * over[1] * over[2] * over[3];
  const int64_t first_item = all_items * blockIdx.y / gradient.splits;
  const int items = static_cast<int>(all_items * (blockIdx.y + 1) / gradient.splits - first_item);

  const auto item_of = [&](int number) {
    int64_t rest = first_item + number;
    int part[4];
    for (int i = 3; i >= 0; --i) part[i] = static_cast<int>(rest % over[i]), rest /= over[i];
    return MaskItem{over[0] > 1 ? part[0] : own[0], over[1] > 1 ? part[1] : own[1],
                    (over[2] > 1 ? part[2] : own[2]) * rows, (over[3] > 1 ? part[3] : own[3]) * kStep};
  };

  float sums[kTiles][4] = {};
  if (items > 0) Scores(rows, 0).copy(p, item_of(0));
  device::async_copy_commit();
  for (int number = 0; number < items; ++number) {
    device::async_copy_wait<0>();
    device::sync_block();
    if (kShape.stages > 1) {
      if (number + 1 < items) Scores(rows, number + 1).copy(p, item_of(number + 1));
      device::async_copy_commit();
    }
    const MaskItem item = item_of(number);
    const int row = item.query + warp_row;
    const HeadMask<T> mask(problem.mask, item.batch, item.head);
    const auto live = mask.template live<kStep, false>({0, problem.keys}, item.key);
    auto seen = visible<false, false, 1, kTiles>(problem, mask, row, problem.queries - row, item.key, live);
    if (device::any_lane(seen.bits != 0)) Scores(rows, number).add(sums, p, item, warp_row, seen, mask);
    if (kShape.stages == 1) {
      device::sync_block();
      if (number + 1 < items) Scores(rows, number + 1).copy(p, item_of(number + 1));
      device::async_copy_commit();
    }
  }

  // Sums over rows or columns, where the mask has but one.
  if (one_column) {
    float of_row[2] = {0.0f, 0.0f};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) of_row[i / 2] += sums[tile][i];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = team_sum(of_row[half], 4);
      sums[0][2 * half] = lane_column() == 0 ? sum : 0.0f;
    }
  }
  MaskSums<kShape.warps, kStep>& shared = device::shared_variable<MaskSums<kShape.warps, kStep>>();
  if (one_row) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = sums[tile][i] + sums[tile][i + 2];
        for (int lanes = 4; lanes < 32; lanes *= 2) sum += device::shuffle_xor(sum, lanes);
        if (lane_row() == 0) shared.of[warp][tile * 8 + lane_column() + i] = sum;
      }
    }
    device::sync_block();
  }

  const auto store = [&](int row, int column, float value) {
    if (row >= gradient.sizes[2] || column >= gradient.sizes[3]) return;
    const int64_t head = int64_t{own[0]} * gradient.sizes[1] + own[1];
    const int64_t at = (head * gradient.sizes[2] + row) * gradient.sizes[3] + column;
    if (gradient.parts != nullptr) {
      gradient.parts[blockIdx.y * elements(gradient) + at] = value;
    } else {
      store_gradient<T>(gradient, at, value);
    }
  };
  const int first_row = own[2] * rows, first_column = own[3] * kStep;
  if (one_row) {
    for (int column = threadIdx.x; column < (one_column ? 1 : kStep); column += blockDim.x) {
      float sum = 0.0f;
      for (int i = 0; i < static_cast<int>(blockDim.x / 32); ++i) sum += shared.of[i][column];
      store(0, first_column + column, sum);
    }
    return;
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (one_column && (tile > 0 || i % 2 != 0 || lane_column() != 0)) continue;
      store(first_row + warp_row + lane_row() + i / 2 * 8, first_column + tile * 8 + lane_column() + i % 2,
            sums[tile][i]);
    }
  }
}

template <typename T, int kKeyDim, int kValueDim>
__global__ void __launch_bounds__(32 * FirstScores<T, kKeyDim, kValueDim>::kShape.warps, 1)
    attention_mask_gradient(BackwardParams p, MaskGradient gradient) {
  mask_gradient<FirstScores<T, kKeyDim, kValueDim>>(p, gradient);
}

}  // namespace fastgen::attention
