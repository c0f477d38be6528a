// Gradients of <dO, out'> + <dlse, lse'> (tangent.cuh), which are those of the first backward pass too, with O(N)
// memory. With P, W, w and M as there, dP = dO V^T M, delta = rowsum(dO * out) - dlse, C = dO Gv^T M,
//   dS = P (dP - delta)        dS2 = (W - w) dS + P (C - rowsum(dO * out'))
//   query       a block owns rows of the queries:   dQ = scale (dS2 K + dS Gk)
//   key_value   a block owns rows of the keys:      dK = scale (dS2^T Q + dS^T Gq)    dV = (P (W - w) M)^T dO
// The gradients of dO and dlse are out' and lse'. As backward: each output has one writer that adds in one order.
#pragma once

#include "attention/backward.cuh"
#include "attention/sides.cuh"

namespace fastgen::attention {

template <typename T, int kKeyDim, int kValueDim>
struct SecondOrderLayout {
  static constexpr Shape kShape = second_order_shape({kKeyDim, kValueDim}, sizeof(T));
  static_assert(kShape.fragments == 1, "a warp owns 16 rows");
  static constexpr int kThreads = 32 * kShape.warps;
  static constexpr int kKeyColumns = smaller(kKeyDim, kShape.columns);
  static constexpr int kValueColumns = smaller(kValueDim, kShape.columns);
  using Queries = QuerySide<T, kKeyDim, kValueDim>;
  using Keys = KeySide<T, kKeyDim, kValueDim>;

  template <typename Own>
  static __device__ __forceinline__ Own own() {
    return {device::dynamic_shared(), static_cast<int>(blockDim.x / 32) * kFragmentRows};
  }
  template <typename Own, typename Passing>
  static __device__ __forceinline__ Passing passing(int step) {
    const int stage = step % kShape.stages * kShape.step * Passing::kBytes;
    return {device::dynamic_shared() + own<Own>().rows * Own::kBytes + stage, kShape.step};
  }
};

// Of one row of the queries.
struct SecondRow {
  float lse;  // in units of log2
  float delta, mean, second_delta;
};

// What becomes of one score, its direction, dP and C, before dropout.
struct SecondScore {
  float tangent, first, second;  // P (W - w) M, dS, dS2

  __device__ __forceinline__ SecondScore(float score, float direction, float grad, float cross, float factor,
                                         const SecondRow& row) {
    const float now = weight(score, row.lse);
    const float centred = direction - row.mean;
    first = score_gradient(now, grad * factor, row.delta);
    // A weight of zero means zero, whatever the others are.
    second = now == 0.0f ? 0.0f : centred * first + now * (cross * factor - row.second_delta);
    tangent = now == 0.0f ? 0.0f : now * centred * factor;
  }
};

// The products of a tile whose rows are queries.
template <typename T, int kTiles>
struct SecondProducts {
  float scores[1][kTiles][4] = {}, direction[1][kTiles][4] = {}, grads[1][kTiles][4] = {}, cross[1][kTiles][4] = {};

  template <typename Queries, typename Keys>
  __device__ __forceinline__ SecondProducts(const SecondOrderParams& p, const Queries& queries, int warp_row,
                                            const Keys& keys, Visible<1, kTiles>& seen, const HeadMask<T>& mask,
                                            const HeadMask<T>& mask_tangent, int row, int key) {
    const Problem& problem = p.first.problem;
    multiply_rows(scores, queries.query(), warp_row, keys.key(), problem.exact);
    multiply_direction(direction, queries, warp_row, keys, p.tangents, problem.exact);
    multiply_rows(grads, queries.grad_out(), warp_row, keys.value(), problem.exact);
    if (p.tangents.value.data != nullptr) {
      multiply_rows(cross, queries.grad_out(), warp_row, keys.tangent_value(), problem.exact);
    }
    mask_scores<false, false>(scores, problem.scale * kLog2e, seen, mask, row, key);
    finish_direction<false>(direction, problem.scale, seen, mask_tangent, row, key);
  }

  // dS goes to grads and dS2 to direction.
  __device__ __forceinline__ void finish(const Problem& problem, int64_t first_of_head, const SecondRow (&rows)[2],
                                         int row, int key) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float factors[4] = {1.0f, 1.0f, 1.0f, 1.0f};
      if (problem.dropout.seeds != nullptr) {
        HeadDropout(problem, first_of_head).factors(factors, row, key + tile * 8);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const SecondScore score(scores[0][tile][i], direction[0][tile][i], grads[0][tile][i], cross[0][tile][i],
                                factors[i], rows[i / 2]);
        grads[0][tile][i] = score.first, direction[0][tile][i] = score.second;
      }
    }
  }
};

template <typename T, int kKeyDim, int kValueDim>
__global__ void __launch_bounds__(SecondOrderLayout<T, kKeyDim, kValueDim>::kThreads, 1)
    attention_second_order_query(SecondOrderParams p) {
  using Layout = SecondOrderLayout<T, kKeyDim, kValueDim>;
  using Queries = typename Layout::Queries;
  using Keys = typename Layout::Keys;
  constexpr Shape kShape = Layout::kShape;
  constexpr int kTiles = kShape.step / 8, kColumns = Layout::kKeyColumns;
  using Steps = KeySteps<T, kShape.step, false>;
  const Problem& problem = p.first.problem;
  const Queries queries = Layout::template own<Queries>();
  const int warp_row = static_cast<int>(threadIdx.x / 32) * kFragmentRows;
  const int first_column = static_cast<int>(blockIdx.y) * kColumns;
  const QueryTile at(problem, blockIdx.x, queries.rows);
  const Steps steps(problem, at);
  const HeadMask<T> mask_tangent(p.tangents.mask, at.batch, at.head);
  const int row = at.queries.begin + warp_row, warp_count = at.count() - warp_row;

  const auto copy_step = [&](const typename Steps::Step& step, int count) {
    copy_side(Layout::template passing<Queries, Keys>(count), p.first, p.tangents, at.batch, at.key_head,
              step.index * kShape.step, 0, [&](int row) { return (step.live >> row & 1) != 0; });
  };
  copy_side(queries, p.first, p.tangents, at.batch, at.head, at.queries.begin,
            [&](int row) { return row < at.count(); });
  auto step = steps.first();
  copy_step(step, 0);
  device::async_copy_commit();

  SecondRow rows[2];
  {
    const RowState state = row_state<T>(p.first, at, row, warp_count);
    float second_delta[2];
    row_products<T>(second_delta, p.tangent_out, p.first.grad_out, at, row, warp_count, problem.value_dim);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int down = half * 8 + lane_row();
      const bool there = down < warp_count;
      rows[half] = {state.lse[half], state.delta[half],
                    there ? read(p.tangent_lse, at.batch, at.head, row + down) : 0.0f, second_delta[half]};
      if (there && lane_column() == 0 && blockIdx.y == 0) {
        p.first.delta[at.first_of_head + row + down] = rows[half].delta;
        p.second_delta[at.first_of_head + row + down] = rows[half].second_delta;
      }
    }
  }

  float sums[1][kColumns / 8][4] = {};
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
    if (!all) seen = visible<false, false, 1, kTiles>(problem, steps.mask, row, warp_count, key, here.live);
    if (warp_count > 0 && (all || device::any_lane(seen.bits != 0))) {
      const Keys keys = Layout::template passing<Queries, Keys>(count);
      SecondProducts<T, kTiles> tile(p, queries, warp_row, keys, seen, steps.mask, mask_tangent, row, key);
      tile.finish(problem, at.first_of_head, rows, row, key);
      const uint32_t live = all ? 0 : seen.columns();
      multiply_weights<T>(sums, tile.direction, keys.key(), first_column, problem.exact, !all, live);
      if (p.tangents.key.data != nullptr) {
        multiply_weights<T>(sums, tile.grads, keys.tangent_key(), first_column, problem.exact, !all, live);
      }
    }
    if (kShape.stages == 1) {
      device::sync_block();
      if (more) copy_step(step, count + 1);
      device::async_copy_commit();
    }
  }
  const float factors[1][2] = {{problem.scale, problem.scale}};
  store_rows(rows_of<T>(p.first.grad_query, at.batch, at.head, row) + first_column, p.first.grad_query.row, warp_count,
             problem.key_dim - first_column, factors, sums);
}

// Scores are transposed here: rows are keys, columns queries. blockIdx.y: which columns of the gradients.
template <typename T, int kKeyDim, int kValueDim>
__global__ void __launch_bounds__(SecondOrderLayout<T, kKeyDim, kValueDim>::kThreads, 1)
    attention_second_order_key_value(SecondOrderParams p) {
  using Layout = SecondOrderLayout<T, kKeyDim, kValueDim>;
  using Queries = typename Layout::Queries;
  using Keys = typename Layout::Keys;
  constexpr Shape kShape = Layout::kShape;
  constexpr int kTiles = kShape.step / 8, kStep = kShape.step;
  constexpr int kKeyColumns = Layout::kKeyColumns, kValueColumns = Layout::kValueColumns;
  const Problem& problem = p.first.problem;
  const Keys keys = Layout::template own<Keys>();
  const int warp_row = static_cast<int>(threadIdx.x / 32) * kFragmentRows;
  const KeyTile at(problem, blockIdx.x, keys.rows);
  const int key = at.keys.begin + warp_row, warp_count = at.keys.end - key;
  const QuerySteps<kStep> steps(problem, at);
  const int count = steps.template count<T, kShape.warps * kFragmentRows, false>(problem, at);

  const auto copy_step = [&](int step) {
    const int head = steps.head(step), query = steps.query(step);
    const auto there = [&](int row) { return query + row < problem.queries; };
    const Queries side = Layout::template passing<Keys, Queries>(step);
    copy_side(side, p.first, p.tangents, at.batch, head, query, there);
    const int64_t first = (static_cast<int64_t>(at.batch) * problem.heads + head) * problem.queries + query;
    for (int row = threadIdx.x; row < kStep; row += blockDim.x) {
      float* beside = side.query().beside(row);
      const int bytes = there(row) ? 4 : 0;
      device::async_copy<4>(beside, pointer(p.first.lse, at.batch, head, query) + row * p.first.lse.row, bytes);
      device::async_copy<4>(beside + 1, p.first.delta + first + row, bytes);
      device::async_copy<4>(beside + 2, pointer(p.tangent_lse, at.batch, head, query) + row * p.tangent_lse.row, bytes);
      device::async_copy<4>(beside + 3, p.second_delta + first + row, bytes);
    }
  };
  copy_side(keys, p.first, p.tangents, at.batch, at.key_head, at.keys.begin, 0,
            [&](int row) { return at.keys.begin + row < at.keys.end; });
  if (count > 0) copy_step(0);
  device::async_copy_commit();

  float key_sums[1][kKeyColumns / 8][4] = {}, value_sums[1][kValueColumns / 8][4] = {};
  const int key_column = static_cast<int>(blockIdx.y) * kKeyColumns;
  const int value_column = static_cast<int>(blockIdx.y) * kValueColumns;
  for (int step = 0; step < count; ++step) {
    device::async_copy_wait<0>();
    device::sync_block();
    if (kShape.stages > 1) {
      if (step + 1 < count) copy_step(step + 1);
      device::async_copy_commit();
    }
    const int head = steps.head(step), query = steps.query(step);
    const HeadMask<T> mask(problem.mask, at.batch, head), mask_tangent(p.tangents.mask, at.batch, head);
    const bool all = steps.all_visible(problem, at, step, keys.rows) && mask.kind == MaskKind::kNone;
    Visible<1, kTiles> seen;
    if (!all) {
      const auto live = mask.template live<kStep, true>(steps.queries(problem, step), query);
      seen = visible<false, true, 1, kTiles>(problem, mask, key, warp_count, query, live);
    }
    if (warp_count > 0 && (all || device::any_lane(seen.bits != 0))) {
      const Queries side = Layout::template passing<Keys, Queries>(step);
      float scores[1][kTiles][4] = {}, direction[1][kTiles][4] = {}, grads[1][kTiles][4] = {}, cross[1][kTiles][4] = {};
      multiply_rows(scores, keys.key(), warp_row, side.query(), problem.exact);
      multiply_direction_transposed(direction, side, keys, warp_row, p.tangents, problem.exact);
      multiply_rows(grads, keys.value(), warp_row, side.grad_out(), problem.exact);
      if (p.tangents.value.data != nullptr) {
        multiply_rows(cross, keys.tangent_value(), warp_row, side.grad_out(), problem.exact);
      }
      mask_scores<false, true>(scores, problem.scale * kLog2e, seen, mask, key, query);
      finish_direction<true>(direction, problem.scale, seen, mask_tangent, key, query);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float factors[4] = {1.0f, 1.0f, 1.0f, 1.0f};
        if (problem.dropout.seeds != nullptr) {
          const int64_t first = (static_cast<int64_t>(at.batch) * problem.heads + head) * problem.queries;
          HeadDropout(problem, first).factors_transposed(factors, query + tile * 8, key);
        }
        SecondRow rows[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float* beside = side.query().beside(tile * 8 + lane_column() + i);
          rows[i] = {kLog2e * beside[0], beside[1], beside[2], beside[3]};
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const SecondScore score(scores[0][tile][i], direction[0][tile][i], grads[0][tile][i], cross[0][tile][i],
                                  factors[i], rows[i % 2]);
          scores[0][tile][i] = score.tangent, grads[0][tile][i] = score.first, direction[0][tile][i] = score.second;
        }
      }
      const uint32_t live = all ? 0 : seen.columns();
      if (value_column < kValueDim) {
        multiply_weights<T>(value_sums, scores, side.grad_out(), value_column, problem.exact, !all, live);
      }
      if (key_column < kKeyDim) {
        multiply_weights<T>(key_sums, direction, side.query(), key_column, problem.exact, !all, live);
        if (p.tangents.query.data != nullptr) {
          multiply_weights<T>(key_sums, grads, side.tangent(), key_column, problem.exact, !all, live);
        }
      }
    }
    if (kShape.stages == 1) {
      device::sync_block();
      if (step + 1 < count) copy_step(step + 1);
      device::async_copy_commit();
    }
  }
  const float factors[1][2] = {{problem.scale, problem.scale}}, ones[1][2] = {{1.0f, 1.0f}};
  store_rows(rows_of<T>(p.first.grad_value, at.batch, at.key_head, key) + value_column, p.first.grad_value.row,
             warp_count, problem.value_dim - value_column, ones, value_sums);
  store_rows(rows_of<T>(p.first.grad_key, at.batch, at.key_head, key) + key_column, p.first.grad_key.row, warp_count,
             problem.key_dim - key_column, factors, key_sums);
}

}  // namespace fastgen::attention
