// The gradient of a float mask: dS, summed over what the mask is broadcast to. A block owns a tile of the mask, which
// is as large as all rows or columns where it is broadcast over them, and goes over its part of the scores; so nothing
// of the size of the scores is stored, and each sum has one order.
#pragma once

#include "attention/backward.cuh"
#include "attention/mask_result.cuh"

namespace fastgen::attention {

template <typename T, int kKeyDim, int kValueDim>
struct MaskLayout {
  static constexpr Shape kShape = mask_shape({kKeyDim, kValueDim}, sizeof(T));
  static constexpr int kThreads = 32 * kShape.warps, kWarpRows = kShape.fragments * kFragmentRows;
  static constexpr int kKeyRow = row_bytes(kKeyDim, sizeof(T)), kValueRow = row_bytes(kValueDim, sizeof(T));

  static __device__ __forceinline__ int block_rows() { return static_cast<int>(blockDim.x / 32) * kWarpRows; }
  static __device__ __forceinline__ unsigned char* stage(int item) {
    return device::dynamic_shared() + item % kShape.stages * (block_rows() + kShape.step) * (kKeyRow + kValueRow);
  }
  using KeyDim = Tile<T, kKeyDim>;
  using ValueDim = Tile<T, kValueDim>;
  static __device__ __forceinline__ KeyDim key(int item) { return {reinterpret_cast<T*>(stage(item))}; }
  static __device__ __forceinline__ ValueDim value(int item) {
    return {reinterpret_cast<T*>(stage(item) + kShape.step * kKeyRow)};
  }
  static __device__ __forceinline__ KeyDim query(int item) {
    return {reinterpret_cast<T*>(stage(item) + kShape.step * (kKeyRow + kValueRow))};
  }
  static __device__ __forceinline__ ValueDim grad_out(int item) {
    const int queries = block_rows() * kKeyRow;
    return {reinterpret_cast<T*>(stage(item) + kShape.step * (kKeyRow + kValueRow) + queries)};
  }
};

// Sums of a block's rows and columns, from warp to warp.
template <int kWarps, int kStep>
struct MaskSums {
  float of[kWarps][kStep];
};

template <typename T, int kKeyDim, int kValueDim>
__global__ void __launch_bounds__(MaskLayout<T, kKeyDim, kValueDim>::kThreads, 1)
    attention_mask_gradient(BackwardParams p, MaskGradient gradient) {
  using Layout = MaskLayout<T, kKeyDim, kValueDim>;
  constexpr Shape kShape = Layout::kShape;
  constexpr int kTiles = kShape.step / 8, kStep = kShape.step;
  static_assert(kShape.fragments == 1, "a warp owns 16 rows");
  const Problem& problem = p.problem;
  const int rows = Layout::block_rows(), warp = static_cast<int>(threadIdx.x / 32);
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

  struct Item {
    int batch, head, query, key;
  };
  const auto item_of = [&](int number) {
    int64_t rest = first_item + number;
    int part[4];
    for (int i = 3; i >= 0; --i) part[i] = static_cast<int>(rest % over[i]), rest /= over[i];
    return Item{over[0] > 1 ? part[0] : own[0], over[1] > 1 ? part[1] : own[1], (over[2] > 1 ? part[2] : own[2]) * rows,
                (over[3] > 1 ? part[3] : own[3]) * kStep};
  };
  const auto copy_item = [&](int number) {
    const Item item = item_of(number);
    const int key_head = item.head / (problem.heads / problem.key_heads);
    const auto row_there = [&](int row) { return item.query + row < problem.queries; };
    const auto key_there = [&](int row) { return item.key + row < problem.keys; };
    copy_rows(Layout::query(number), rows, rows_of<T>(p.query, item.batch, item.head, item.query), p.query.row,
              problem.key_dim, row_there);
    copy_rows(Layout::grad_out(number), rows, rows_of<T>(p.grad_out, item.batch, item.head, item.query), p.grad_out.row,
              problem.value_dim, row_there);
    copy_rows(Layout::key(number), kStep, rows_of<T>(p.key, item.batch, key_head, item.key), p.key.row, problem.key_dim,
              key_there);
    copy_rows(Layout::value(number), kStep, rows_of<T>(p.value, item.batch, key_head, item.key), p.value.row,
              problem.value_dim, key_there);
  };

  float sums[kTiles][4] = {};
  if (items > 0) copy_item(0);
  device::async_copy_commit();
  for (int number = 0; number < items; ++number) {
    device::async_copy_wait<0>();
    device::sync_block();
    if (kShape.stages > 1) {
      if (number + 1 < items) copy_item(number + 1);
      device::async_copy_commit();
    }
    const Item item = item_of(number);
    const int row = item.query + warp_row, warp_count = problem.queries - row;
    const HeadMask<T> mask(problem.mask, item.batch, item.head);
    const auto live = mask.template live<kStep, false>({0, problem.keys}, item.key);
    auto seen = visible<false, false, 1, kTiles>(problem, mask, row, warp_count, item.key, live);
    if (device::any_lane(seen.bits != 0)) {
      float scores[1][kTiles][4] = {}, grads[1][kTiles][4] = {};
      multiply_rows(scores, Layout::query(number), warp_row, Layout::key(number), problem.exact);
      multiply_rows(grads, Layout::grad_out(number), warp_row, Layout::value(number), problem.exact);
      mask_scores<false, false>(scores, problem.scale * kLog2e, seen, mask, row, item.key);
      const int64_t first_of_head = (static_cast<int64_t>(item.batch) * problem.heads + item.head) * problem.queries;
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
    if (kShape.stages == 1) {
      device::sync_block();
      if (number + 1 < items) copy_item(number + 1);
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

}  // namespace fastgen::attention
