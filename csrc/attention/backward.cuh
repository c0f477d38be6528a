// Gradients of queries, keys and values from the rows' logsumexp, with O(N) memory. Two kernels, one after the other:
//   query       a block owns rows of the queries and the keys pass by:  delta = rowsum(dO * O) - dlse, dQ = scale dS K
//   key_value   a block owns rows of the keys and the queries pass by:  dK = scale dS^T Q, dV = P^T dO
// with S = scale Q K^T + mask, P = 2^(S - lse), dP = dO V^T, dS = P (dP - delta), P and dP with dropout. (Dao,
// "FlashAttention-2", 2023.) Each output has one writer that adds in one order: the bits never depend on the schedule.
#pragma once

#include "attention/dropout.cuh"
#include "attention/position.cuh"
#include "attention/softmax.cuh"
#include "attention/store.cuh"
#include "common/reduce.cuh"
#include "device/barrier.cuh"
#include "device/shared.cuh"

namespace fastgen::attention {

// What a block owns, and what passes by: (queries, dO) and (keys, values), or the other way round.
template <typename T, int kKeyDim, int kValueDim>
struct BackwardLayout {
  static constexpr Dims kDims = {kKeyDim, kValueDim};
  static constexpr Shape kShape = query_shape(kDims, sizeof(T)), kKeyValueShape = key_value_shape(kDims, sizeof(T));
  static constexpr int kQueryColumns = smaller(kKeyDim, kShape.columns);
  static constexpr int kKeyColumns = smaller(kKeyDim, kKeyValueShape.columns);
  static constexpr int kValueColumns = smaller(kValueDim, kKeyValueShape.columns);
  static constexpr int kThreads = 32 * kShape.warps, kWarpRows = kShape.fragments * kFragmentRows;
  using KeyDim = Tile<T, kKeyDim>;
  using ValueDim = Tile<T, kValueDim>;
  static constexpr int kKeyRow = row_bytes(kKeyDim, sizeof(T)), kValueRow = row_bytes(kValueDim, sizeof(T));

  static __device__ __forceinline__ int block_rows() { return static_cast<int>(blockDim.x / 32) * kWarpRows; }
  static __device__ __forceinline__ KeyDim own_key_dim() { return {reinterpret_cast<T*>(device::dynamic_shared())}; }
  static __device__ __forceinline__ ValueDim own_value_dim() {
    return {reinterpret_cast<T*>(device::dynamic_shared() + block_rows() * kKeyRow)};
  }
  static __device__ __forceinline__ unsigned char* stage(int step) {
    return device::dynamic_shared() + (block_rows() + step % kShape.stages * kShape.step) * (kKeyRow + kValueRow);
  }
  static __device__ __forceinline__ KeyDim key_dim(int step) { return {reinterpret_cast<T*>(stage(step))}; }
  static __device__ __forceinline__ ValueDim value_dim(int step) {
    return {reinterpret_cast<T*>(stage(step) + kShape.step * kKeyRow)};
  }
};

// Rows g and g + 8 of a fragment: their logsumexp in units of log2, and delta.
struct RowState {
  float lse[2], delta[2];
};

// rowsum(a * b) of rows g and g + 8 from ``row`` on, 0 from ``count`` on. The four lanes of a row share it.
template <typename T>
__device__ __forceinline__ void row_products(float (&sums)[2], const Operand& a, const Operand& b, const QueryTile& at,
                                             int row, int count, int columns) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int down = half * 8 + lane_row();
    float sum = 0.0f;
    if (down < count) {
      const T* left = rows_of<T>(a, at.batch, at.head, row + down);
      const T* right = rows_of<T>(b, at.batch, at.head, row + down);
      constexpr int kChunk = device::kVectorElements<T>;
      for (int column = threadIdx.x % 4 * kChunk; column < columns; column += 4 * kChunk) {
        T x[kChunk], y[kChunk];
        device::load_vector(left + column, x), device::load_vector(right + column, y);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) sum += device::to_float(x[i]) * device::to_float(y[i]);
      }
    }
    sums[half] = team_sum(sum, 4);
  }
}

// ``count``: rows that are there, from ``row`` on.
template <typename T>
__device__ __forceinline__ RowState row_state(const BackwardParams& p, const QueryTile& at, int row, int count) {
  RowState state;
  row_products<T>(state.delta, p.out, p.grad_out, at, row, count, p.problem.value_dim);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int down = half * 8 + lane_row();
    state.lse[half] = -INFINITY;
    if (down < count) {
      state.lse[half] = kLog2e * read(p.lse, at.batch, at.head, row + down);
      if (p.grad_lse.data != nullptr) state.delta[half] -= read(p.grad_lse, at.batch, at.head, row + down);
    }
  }
  return state;
}

// P (dP - delta), where a weight of zero means zero, whatever dP is.
__device__ __forceinline__ float score_gradient(float weight, float grad, float delta) {
  return weight == 0.0f ? 0.0f : weight * (grad - delta);
}

// Scores become their own gradients. ``grads`` is dP.
template <bool kPlain, int kFragments, int kTiles>
__device__ __forceinline__ void score_gradients(float (&scores)[kFragments][kTiles][4],
                                                const float (&grads)[kFragments][kTiles][4],
                                                const RowState (&state)[kFragments], const Problem& problem,
                                                int64_t first_of_head, int query, int key) {
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float factors[4] = {1.0f, 1.0f, 1.0f, 1.0f};
      if constexpr (!kPlain) {
        if (problem.dropout.seeds != nullptr) {
          HeadDropout(problem, first_of_head).factors(factors, query + m * kFragmentRows, key + tile * 8);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[m][tile][i];
        score =
            score_gradient(weight(score, state[m].lse[i / 2]), grads[m][tile][i] * factors[i], state[m].delta[i / 2]);
      }
    }
  }
}

template <typename T, int kKeyDim, int kValueDim, bool kPlain>
__global__ void __launch_bounds__(BackwardLayout<T, kKeyDim, kValueDim>::kThreads, 1)
    attention_backward_query(BackwardParams p) {
  using Layout = BackwardLayout<T, kKeyDim, kValueDim>;
  constexpr Shape kShape = Layout::kShape;
  constexpr int kFragments = kShape.fragments, kTiles = kShape.step / 8;
  constexpr int kColumns = Layout::kQueryColumns;
  using Steps = KeySteps<T, kShape.step, kPlain>;
  const Problem& problem = p.problem;
  const int rows = Layout::block_rows(), warp_row = static_cast<int>(threadIdx.x / 32) * Layout::kWarpRows;
  const int first_column = static_cast<int>(blockIdx.y) * kColumns;
  const QueryTile at(problem, blockIdx.x, rows);
  const Steps steps(problem, at);
  const int row = at.queries.begin + warp_row, warp_count = at.count() - warp_row;

  const auto copy_step = [&](const typename Steps::Step& step, int count) {
    const auto there = [&](int row) { return (step.live >> row & 1) != 0; };
    const int key = step.index * kShape.step;
    copy_rows(Layout::key_dim(count), kShape.step, rows_of<T>(p.key, at.batch, at.key_head, key), p.key.row,
              problem.key_dim, there);
    copy_rows(Layout::value_dim(count), kShape.step, rows_of<T>(p.value, at.batch, at.key_head, key), p.value.row,
              problem.value_dim, there);
  };
  const auto there = [&](int row) { return row < at.count(); };
  copy_rows(Layout::own_key_dim(), rows, rows_of<T>(p.query, at.batch, at.head, at.queries.begin), p.query.row,
            problem.key_dim, there);
  copy_rows(Layout::own_value_dim(), rows, rows_of<T>(p.grad_out, at.batch, at.head, at.queries.begin), p.grad_out.row,
            problem.value_dim, there);
  auto step = steps.first();
  copy_step(step, 0);
  device::async_copy_commit();

  RowState state[kFragments];
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
    state[m] = row_state<T>(p, at, row + m * kFragmentRows, warp_count - m * kFragmentRows);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int down = m * kFragmentRows + half * 8 + lane_row();
      if (down < warp_count && lane_column() == 0 && blockIdx.y == 0) {
        p.delta[at.first_of_head + row + down] = state[m].delta[half];
      }
    }
  }

  float sums[kFragments][kColumns / 8][4] = {};
  const float scale = problem.scale * kLog2e;
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
    Visible<kFragments, kTiles> seen;
    if (!all) seen = visible<kPlain, false, kFragments, kTiles>(problem, steps.mask, row, warp_count, key, here.live);
    if (warp_count > 0 && (all || device::any_lane(seen.bits != 0))) {
      float scores[kFragments][kTiles][4] = {}, grads[kFragments][kTiles][4] = {};
      multiply_rows(scores, Layout::own_key_dim(), warp_row, Layout::key_dim(count), problem.exact);
      multiply_rows(grads, Layout::own_value_dim(), warp_row, Layout::value_dim(count), problem.exact);
      mask_scores<kPlain, false>(scores, scale, seen, steps.mask, row, key);
      score_gradients<kPlain>(scores, grads, state, problem, at.first_of_head, row, key);
      const uint32_t live = kPlain || all ? 0 : seen.columns();
      multiply_weights<T>(sums, scores, Layout::key_dim(count), first_column, problem.exact, !kPlain && !all, live);
    }
    if (kShape.stages == 1) {
      device::sync_block();
      if (more) copy_step(step, count + 1);
      device::async_copy_commit();
    }
  }
  float factors[kFragments][2];
#pragma unroll
  for (int m = 0; m < kFragments; ++m) factors[m][0] = factors[m][1] = problem.scale;
  store_rows(rows_of<T>(p.grad_query, at.batch, at.head, row) + first_column, p.grad_query.row, warp_count,
             problem.key_dim - first_column, factors, sums);
}

// Scores are transposed here: rows are keys, columns queries. blockIdx.y: which columns of the gradients.
template <typename T, int kKeyDim, int kValueDim, bool kPlain>
__global__ void __launch_bounds__(BackwardLayout<T, kKeyDim, kValueDim>::kThreads, 1)
    attention_backward_key_value(BackwardParams p) {
  using Layout = BackwardLayout<T, kKeyDim, kValueDim>;
  constexpr Shape kShape = Layout::kKeyValueShape;
  constexpr int kFragments = kShape.fragments, kTiles = kShape.step / 8, kStep = kShape.step;
  constexpr int kKeyColumns = Layout::kKeyColumns, kValueColumns = Layout::kValueColumns;
  const Problem& problem = p.problem;
  const int rows = Layout::block_rows(), warp_row = static_cast<int>(threadIdx.x / 32) * Layout::kWarpRows;
  const KeyTile at(problem, blockIdx.x, rows);
  const int key = at.keys.begin + warp_row, warp_count = at.keys.end - key;
  const QuerySteps<kStep> steps(problem, at);
  const int count = steps.template count<T, Layout::kWarpRows * kShape.warps, kPlain>(problem, at);

  const auto copy_step = [&](int step) {
    const int head = steps.head(step), query = steps.query(step);
    const auto there = [&](int row) { return query + row < problem.queries; };
    const auto tile = Layout::key_dim(step);
    copy_rows(tile, kStep, rows_of<T>(p.query, at.batch, head, query), p.query.row, problem.key_dim, there);
    copy_rows(Layout::value_dim(step), kStep, rows_of<T>(p.grad_out, at.batch, head, query), p.grad_out.row,
              problem.value_dim, there);
    const float* lse = pointer(p.lse, at.batch, head, query);
    const float* delta = p.delta + (static_cast<int64_t>(at.batch) * problem.heads + head) * problem.queries + query;
    for (int row = threadIdx.x; row < kStep; row += blockDim.x) {
      device::async_copy<4>(tile.beside(row), lse + row * p.lse.row, there(row) ? 4 : 0);
      device::async_copy<4>(tile.beside(row) + 1, delta + row, there(row) ? 4 : 0);
    }
  };
  const auto there = [&](int row) { return at.keys.begin + row < at.keys.end; };
  copy_rows(Layout::own_key_dim(), rows, rows_of<T>(p.key, at.batch, at.key_head, at.keys.begin), p.key.row,
            problem.key_dim, there);
  copy_rows(Layout::own_value_dim(), rows, rows_of<T>(p.value, at.batch, at.key_head, at.keys.begin), p.value.row,
            problem.value_dim, there);
  if (count > 0) copy_step(0);
  device::async_copy_commit();

  float key_sums[kFragments][kKeyColumns / 8][4] = {}, value_sums[kFragments][kValueColumns / 8][4] = {};
  const int key_column = static_cast<int>(blockIdx.y) * kKeyColumns;
  const int value_column = static_cast<int>(blockIdx.y) * kValueColumns;
  const float scale = problem.scale * kLog2e;
  for (int step = 0; step < count; ++step) {
    device::async_copy_wait<0>();
    device::sync_block();
    if (kShape.stages > 1) {
      if (step + 1 < count) copy_step(step + 1);
      device::async_copy_commit();
    }
    const int head = steps.head(step), query = steps.query(step);
    const HeadMask<T> mask(problem.mask, at.batch, head);
    const bool all = steps.all_visible(problem, at, step, rows) && (kPlain || mask.kind == MaskKind::kNone);
    Visible<kFragments, kTiles> seen;
    if (!all) {
      const auto live = mask.template live<kStep, true>(steps.queries(problem, step), query);
      seen = visible<kPlain, true, kFragments, kTiles>(problem, mask, key, warp_count, query, live);
    }
    if (warp_count > 0 && (all || device::any_lane(seen.bits != 0))) {
      float scores[kFragments][kTiles][4] = {}, grads[kFragments][kTiles][4] = {};
      multiply_rows(scores, Layout::own_key_dim(), warp_row, Layout::key_dim(step), problem.exact);
      multiply_rows(grads, Layout::own_value_dim(), warp_row, Layout::value_dim(step), problem.exact);
      mask_scores<kPlain, true>(scores, scale, seen, mask, key, query);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float lse[2], delta[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float* state = Layout::key_dim(step).beside(tile * 8 + lane_column() + i);
          lse[i] = kLog2e * state[0], delta[i] = state[1];
        }
#pragma unroll
        for (int m = 0; m < kFragments; ++m) {
          float factors[4] = {1.0f, 1.0f, 1.0f, 1.0f};
          if constexpr (!kPlain) {
            if (problem.dropout.seeds != nullptr) {
              const int64_t first = (static_cast<int64_t>(at.batch) * problem.heads + head) * problem.queries;
              HeadDropout(problem, first).factors_transposed(factors, query + tile * 8, key + m * kFragmentRows);
            }
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float now = weight(scores[m][tile][i], lse[i % 2]);
            grads[m][tile][i] = score_gradient(now, grads[m][tile][i] * factors[i], delta[i % 2]);
            scores[m][tile][i] = now * factors[i];
          }
        }
      }
      const uint32_t live = kPlain || all ? 0 : seen.columns();
      const bool holes = !kPlain && !all;
      if (value_column < kValueDim) {
        multiply_weights<T>(value_sums, scores, Layout::value_dim(step), value_column, problem.exact, holes, live);
      }
      if (key_column < kKeyDim) {
        multiply_weights<T>(key_sums, grads, Layout::key_dim(step), key_column, problem.exact, holes, live);
      }
    }
    if (kShape.stages == 1) {
      device::sync_block();
      if (step + 1 < count) copy_step(step + 1);
      device::async_copy_commit();
    }
  }
  float factors[kFragments][2], ones[kFragments][2];
#pragma unroll
  for (int m = 0; m < kFragments; ++m) factors[m][0] = factors[m][1] = problem.scale, ones[m][0] = ones[m][1] = 1.0f;
  store_rows(rows_of<T>(p.grad_value, at.batch, at.key_head, key) + value_column, p.grad_value.row, warp_count,
             problem.value_dim - value_column, ones, value_sums);
  store_rows(rows_of<T>(p.grad_key, at.batch, at.key_head, key) + key_column, p.grad_key.row, warp_count,
             problem.key_dim - key_column, factors, key_sums);
}

}  // namespace fastgen::attention
