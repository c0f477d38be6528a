// The whole backward pass of problems whose scores of one head fit one tile, such as local windows: dQ, dK, dV and the
// gradient of a learned bias in one kernel, with five products, where the two or three kernels of backward.cuh and
// mask_gradient.cuh compute S and dP again in each, seven or nine products, and read their operands again.
//
//   for each head of the block (several only if they share a mask whose gradient is computed)
//     load Q, dO, K, V
//     S = Q K^T, dP = dO V^T, P, delta = rowsum(P * dP) - dlse     a warp has 16 queries and all keys in registers
//     dS = P (dP - delta);  bias gradient += dS;  dQ = dS K
//     P, dS to shared memory, in the place of K and V
//     dV = P^T dO, dK = dS^T Q                                     a warp has 32 keys of one of the two
//
// P and dS are exchanged in the storage type, in which they enter the products anyway. Counted per warp, for 64 x 64
// scores of two bytes and head dim 32: 32 stores of 4 bytes and 8 ldmatrix, where S^T and dP^T would take 32 mma, 20
// ldmatrix and the exponentials again. delta needs no O: all of a row is in registers.
//
// Every output is accumulated by one block in a fixed order, without atomics: results do not depend on the schedule.
#pragma once

#include "attention/mask_reduce.cuh"
#include "attention/one_tile_rows.cuh"

namespace fastgen::attention {

// The heads that a block processes, as indices among all (batch, head): one, or those that its part of a mask's
// gradient is the sum over.
struct OneTileHeads {
  int first, end, step;

  __device__ __forceinline__ OneTileHeads(const Problem& problem, const MaskGradient& gradient, bool learned) {
    first = static_cast<int>(blockIdx.x), end = first + 1, step = 1;
    if (!learned) return;
    const bool all_heads = gradient.sizes[1] == 1;
    const int64_t all = int64_t{gradient.sizes[0] == 1 ? problem.batch : 1} * (all_heads ? problem.heads : 1);
    const int begin = static_cast<int>(all * blockIdx.y / gradient.splits);
    const int count = static_cast<int>(all * (blockIdx.y + 1) / gradient.splits) - begin;
    step = all_heads ? 1 : problem.heads;
    first = first * (all_heads ? problem.heads : 1) + begin * step, end = first + count * step;
  }
};

// Starts the copies of ``rows`` rows of two tensors, with zeros for those that are not ``valid``; a head's first row is
// at ``a`` and ``b``.
template <typename T, int kDim>
__device__ __forceinline__ void copy_two(const Tile<T, kDim>& to_a, const Tile<T, kDim>& to_b, int warp, int rows,
                                         const Range& valid, const T* a, const T* b, int64_t stride_a, int64_t stride_b,
                                         int columns_a, int columns_b) {
  using C = Chunks<T, kDim>;
  const int64_t advance_a = C::step() * stride_a, advance_b = C::step() * stride_b;
  const int first = warp * C::kDown + C::row() % C::kDown;
  a += first * stride_a + C::column(), b += first * stride_b + C::column();
#pragma unroll 1
  for (int row = first; row < rows; row += C::step(), a += advance_a, b += advance_b) {
    const bool is_valid = row >= valid.begin && row < valid.end;
    C::copy(to_a.at(row, C::column()), a, is_valid, columns_a);
    C::copy(to_b.at(row, C::column()), b, is_valid, columns_b);
  }
}

// The left operand of 16 columns of a tile as rows, from kDepth rows as columns; in the order of Product::load_down.
template <typename T>
__device__ __forceinline__ void load_left_down(uint32_t (&left)[4], const T* corner, int stride) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      left[i] = float_to_bits(corner[(lane_column() + i / 2) * stride + lane_row() + i % 2 * 8]);
    }
  } else {
    const int lane = threadIdx.x % 32;
    device::ldmatrix_trans(left, corner + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
  }
}

// 32 keys times the head dim of dV = P^T dO or dK = dS^T Q: sums += left^T right.
template <bool kPlain, typename T, int kDim, int kRows>
__device__ __forceinline__ void multiply_columns(float (&sums)[2][kDim / 8][4],
                                                 const OneTileLayout<T, kDim, kRows>& tiles, const Tile<T, kRows>& left,
                                                 const Tile<T, kDim>& right, int chunk, bool exact) {
  using P = Product<T>;
  constexpr int kUnrolled = sizeof(T) == 2 && kDim <= 64 ? 2 : 1;
#pragma unroll(kUnrolled)
  for (int query = 0; query < tiles.block_m; query += kFragmentRows) {
    uint32_t live = 0;  // this lane's queries that attend to any of the keys; others count as zeros
    if constexpr (!kPlain) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t seen = *tiles.seen_keys(query + i / 2 * 8 + lane_column() + i % 2);
        live |= (seen >> chunk & 1u) << i;
      }
      if (!device::any_lane(live != 0)) continue;
    }
    const bool masked = !kPlain && !device::all_lanes(live == 15);
#pragma unroll
    for (int depth = 0; depth < kFragmentRows; depth += P::kDepth) {
      uint32_t loaded[4];
      Factor<T> a[2];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int key = chunk * kOneTileChunk + m * kFragmentRows;
        load_left_down(loaded, left.at(query + depth, key), Tile<T, kRows>::kStride);
        a[m].set(loaded, exact);
      }
#pragma unroll
      for (int tile = 0; tile < kDim / 8; tile += 2) {
        P::load_down(loaded, right.at(query + depth, tile * 8), Tile<T, kDim>::kStride);
        if (masked) P::keep_rows(loaded, live >> depth / 4);
        Factor<T> b[1];
        b[0].set(loaded, exact);
        P::multiply(sums, tile, a, b, exact);
      }
    }
  }
}

// Stores an element of a mask's gradient, or of this block's part of it.
template <typename T>
__device__ __forceinline__ void store_part(const MaskGradient& gradient, int64_t at, float value) {
  if (gradient.parts != nullptr) {
    gradient.parts[blockIdx.y * elements(gradient) + at] = value;
  } else {
    store_gradient<T>(gradient, at, value);
  }
}

// gridDim = (heads of all batch entries, or of the mask; splits of the mask's gradient).
template <typename T, int kDim, int kRows, int kBlocks, OneTileKind kKind>
__global__ void __launch_bounds__(32 * kRows / kFragmentRows, kBlocks)
    attention_backward_one_tile(BackwardParams p, MaskGradient gradient) {
  constexpr bool kPlain = kKind == OneTileKind::kPlain, kLearned = kKind == OneTileKind::kLearned;
  using Layout = OneTileLayout<T, kDim, kRows>;
  using Scores = OneTileRows<T, kDim, kRows, kKind>;
  constexpr int kChunks = Scores::kChunks, kTiles = Scores::kTiles;
  const Problem& problem = p.problem;
  const Layout tiles(problem);
  const OneTileHeads heads(problem, gradient, kLearned);
  Scores scores;
  if constexpr (kLearned) {
    const int row = uniform_warp() * kFragmentRows;
    const HeadMask<T> mask(problem.mask, heads.first / problem.heads, heads.first % problem.heads);
    if (row < tiles.block_m) scores.load_bias(problem, tiles, mask, row);
  }
  float bias[kLearned ? kChunks : 1][kTiles][4] = {};

  for (int index = heads.first; index < heads.end; index += heads.step) {
    const int warp = uniform_warp(), row = warp * kFragmentRows;
    const bool has_rows = row < tiles.block_m;
    const auto all_heads = static_cast<unsigned>(problem.heads);
    const unsigned batch = static_cast<unsigned>(index) / all_heads, head = static_cast<unsigned>(index) % all_heads;
    const int64_t first_row = int64_t{index} * problem.queries;
    const auto corner = [&](const Operand& operand) { return row_pointer<T>(operand, batch, head, 0); };
    // Rows outside of every window may contain inf or NaN. Where there may be a mask, products leave out what nothing
    // attends to; elsewhere such rows are zeros.
    Range queries = {0, problem.queries}, keys = {0, problem.keys};
    if constexpr (kPlain) {
      const Range all_queries = queries, all_keys = keys;
      queries = queries_in_window(problem, all_keys, problem.queries);
      keys = keys_in_window(problem, all_queries, problem.keys);
    }
    copy_two(tiles.query(), tiles.grad_out(), warp, tiles.block_m, queries, corner(p.query), corner(p.grad_out),
             p.query.row, p.grad_out.row, problem.key_dim, problem.value_dim);
    copy_two(tiles.key(), tiles.value(), warp, tiles.block_n, keys, corner(p.key), corner(p.value), p.key.row,
             p.value.row, problem.key_dim, problem.value_dim);
    device::async_copy_commit();
    float shift[2] = {INFINITY, INFINITY};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = row + half * 8 + lane_row();
      if (query < problem.queries) shift[half] = weight_shift(kLog2e * *row_pointer(p.lse, batch, head, query));
    }
    device::async_copy_wait<0>();
    device::sync_block();

    if (has_rows) {
      const HeadMask<T> mask(problem.mask, batch, head);
      scores.compute(problem, tiles, mask, first_row, row, shift);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = row + half * 8 + lane_row();
        if (query >= problem.queries) continue;
        if (p.grad_lse.data != nullptr) scores.delta[half] -= *row_pointer(p.grad_lse, batch, head, query);
        if (!kLearned && lane_column() == 0) p.delta[first_row + query] = scores.delta[half];
      }
      float sums[1][kDim / 8][4] = {};
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (!scores.active[c]) continue;
        scores.finish(problem, c);
        if constexpr (kLearned) {
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int k = 0; k < 4; ++k) bias[c][n][k] += scores.grads[c][0][n][k];
          }
        }
        const uint32_t live = kPlain ? 0 : scores.live_columns(c);
        const bool masked = !kPlain && !device::all_lanes(live == Scores::kAllLive);
        multiply_weights<T, true>(sums, scores.grads[c], tiles.keys(tiles.key(), c * kOneTileChunk), 0, problem.exact,
                                  masked, live);
      }
      const float factors[1][2] = {{problem.scale, problem.scale}};
      store_rows(row_pointer<T>(p.grad_query, batch, head, row), p.grad_query.row, problem.queries - row,
                 problem.key_dim, factors, sums);
    }
    device::sync_block();  // all warps have left K and V
    if (has_rows) scores.store(tiles, row);
    device::sync_block();

    const int chunk = warp / 2, key = chunk * kOneTileChunk;
    if (key < problem.keys) {
      const bool of_key = warp % 2 != 0;
      float sums[2][kDim / 8][4] = {};
      multiply_columns<kPlain>(sums, tiles, of_key ? tiles.grads() : tiles.weights(),
                               of_key ? tiles.query() : tiles.grad_out(), chunk, problem.exact);
      const Result& result = of_key ? p.grad_key : p.grad_value;
      const float factor = of_key ? problem.scale : 1.0f;
      const float factors[2][2] = {{factor, factor}, {factor, factor}};
      store_rows(row_pointer<T>(result, batch, head, key), result.row, problem.keys - key,
                 of_key ? problem.key_dim : problem.value_dim, factors, sums);
    }
    if (kLearned && index + heads.step < heads.end) device::sync_block();  // all warps have left the tiles
  }

  if constexpr (kLearned) {
    // Through shared memory, where each lane's part of the bias was, to whole rows.
    const int warp = uniform_warp(), row = warp * kFragmentRows;
    if (row < tiles.block_m) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) scores.put_bias(bias[c], tiles, c, row);
    }
    device::sync_block();
    const int64_t first = int64_t{blockIdx.x} * problem.queries * problem.keys;
    for (int query = warp; query < problem.queries; query += static_cast<int>(blockDim.x / 32)) {
      for (int key = static_cast<int>(threadIdx.x % 32); key < problem.keys; key += 32) {
        store_part<T>(gradient, first + query * problem.keys + key, *tiles.bias(query, key));
      }
    }
  }
}

}  // namespace fastgen::attention
