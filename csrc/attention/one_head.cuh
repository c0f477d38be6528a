// The backward pass of heads whose keys fit one block: dQ, dK and dV in one kernel, with five products, where the two
// kernels of backward.cuh compute S and dP again, seven products, and read their operands again.
//
//   load K, V;  delta = rowsum(dO * O) - dlse                       a warp has 32 keys, and 16 rows of delta at a time
//   for each query tile that attends to any key
//     load Q, dO, lse, delta
//     S^T = K Q^T, dP^T = V dO^T, P^T, dS^T                         a warp has 32 keys and all queries of the tile
//     dS^T to shared memory;  dV += P^T dO, dK += dS^T Q
//     dQ = dS K                                                     a warp has 16 queries and 16 columns, and all keys
//
//            queries, BLOCK_M at a time ->                           key dim
//          +---------+---------+---                             +---+---+---+---+
//   keys   | warp 0  |         |           dS^T transposed, K   | 0 | 2 | 4 | 6 |
//          | ...     |         |                     ->         +---+---+---+---+
//          | warp 7  |         |                                | 1 | 3 | 5 | 7 |
//          +---------+---------+---                             +---+---+---+---+
//
// Every output is accumulated by one block in a fixed order, without atomics: results do not depend on the schedule.
#pragma once

#include "attention/one_head.h"
#include "attention/one_tile.cuh"

namespace fastgen::attention {

template <typename T, int kDim>
struct OneHeadLayout {
  static constexpr int BLOCK_M = kOneHeadQueries, kThreads = 32 * kOneHeadWarps;
  using Rows = Tile<T, kDim>;
  using Grads = Tile<T, BLOCK_M>;  // dS^T: a row per key
  static_assert(BLOCK_M / kFragmentRows * (kDim / 16) == kOneHeadWarps, "a warp has 16 rows and 16 columns of dQ");
  static constexpr int kRow = row_bytes(kDim, sizeof(T)), kKeysBegin = 2 * 2 * BLOCK_M * kRow;
  int block_n;  // as in one_head_plan

  explicit __device__ __forceinline__ OneHeadLayout(const Problem& problem)
      : block_n((problem.keys + kOneHeadKeys - 1) / kOneHeadKeys * kOneHeadKeys) {}
  static __device__ __forceinline__ T* at(int byte) { return reinterpret_cast<T*>(device::dynamic_shared() + byte); }
  static __device__ __forceinline__ Rows query(int stage) { return {at(2 * stage * BLOCK_M * kRow)}; }
  static __device__ __forceinline__ Rows grad_out(int stage) { return {at((2 * stage + 1) * BLOCK_M * kRow)}; }
  static __device__ __forceinline__ Rows key() { return {at(kKeysBegin)}; }
  __device__ __forceinline__ Rows value() const { return {at(kKeysBegin + block_n * kRow)}; }
  __device__ __forceinline__ Grads grads() const { return {at(kKeysBegin + 2 * block_n * kRow)}; }
};

// All query tiles of a head, because dQ of queries without keys is written, too.
template <int BLOCK_M>
struct HeadTiles {
  using Index = int;
  const Problem& problem;

  __device__ __forceinline__ bool has_first() const { return problem.queries > 0; }
  __device__ __forceinline__ Index next(Index tile) const { return tile + 1; }
  __device__ __forceinline__ bool contains(Index tile) const { return tile * BLOCK_M < problem.queries; }
};

// Without masks, dropout and softcaps. gridDim = (heads of all batch entries).
template <typename T, int kDim>
__global__ void __launch_bounds__(OneHeadLayout<T, kDim>::kThreads, 1) attention_backward_one_head(BackwardParams p) {
  using Layout = OneHeadLayout<T, kDim>;
  constexpr int BLOCK_M = Layout::BLOCK_M, kTiles = BLOCK_M / 8, kFragments = 2;
  using P = Product<T>;
  using Tiles = HeadTiles<BLOCK_M>;
  const Problem& problem = p.problem;
  const Layout layout(problem);
  const int warp = uniform_warp();
  const KeyBlock<false> block(problem, blockIdx.x, layout.block_n);
  const int key = warp * kOneHeadKeys;
  const Tiles tiles = {problem};

  // Rows outside of every window may contain inf or NaN: they are zeros.
  const Range seen = keys_in_window(problem, {0, problem.queries}, problem.keys);
  const auto is_key = [&](int row) { return row >= seen.begin && row < seen.end; };
  copy_rows(Layout::key(), layout.block_n, row_pointer<T>(p.key, block.place, block.key_head, 0), p.key.row,
            problem.key_dim, is_key);
  copy_rows(layout.value(), layout.block_n, row_pointer<T>(p.value, block.place, block.key_head, 0), p.value.row,
            problem.value_dim, is_key);
  {
    const QueryBlock rows(problem, blockIdx.x, problem.queries, MayPack<false>{});
    for (int row = warp * kFragmentRows; row < problem.queries; row += kOneHeadWarps * kFragmentRows) {
      const RowState state = row_state<T>(p, rows, row, problem.queries - row);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = row + half * 8 + lane_row();
        if (query < problem.queries && lane_column() == 0) p.delta[rows.first_row + query] = state.delta[half];
      }
    }
  }
  device::sync_block();  // delta is visible

  // From a lane, so that the compiler does not keep parts of addresses in registers over the loop.
  struct Place {
    int batch, head;
  };
  const auto place = [&] { return Place{device::shuffle(block.place, 0), device::shuffle(block.key_head, 0)}; };
  const auto load_queries = [&](int tile, int i) {
    const int query = tile * BLOCK_M;
    const int existing = queries_in_window(problem, {0, problem.keys}, problem.queries).end - query;
    const auto [batch, head] = place();
    // A chunk of each per thread.
    constexpr int kChunk = Layout::Rows::kChunk;
    static_assert(BLOCK_M * kDim == Layout::kThreads * kChunk, "every thread copies one chunk of a tile");
    const int row = static_cast<int>(threadIdx.x) / (kDim / kChunk);
    const int column = static_cast<int>(threadIdx.x) % (kDim / kChunk) * kChunk;
    const bool valid = row < existing;
    device::async_copy<16>(Layout::query(i).at(row, column), row_pointer<T>(p.query, batch, head, query + row) + column,
                           valid && column < problem.key_dim ? 16 : 0);
    device::async_copy<16>(Layout::grad_out(i).at(row, column),
                           row_pointer<T>(p.grad_out, batch, head, query + row) + column,
                           valid && column < problem.value_dim ? 16 : 0);
    if (column != 0) return;
    float* extra = Layout::query(i).row_extra(row);
    const float* delta = p.delta + (int64_t{batch} * problem.heads + head) * problem.queries + query + row;
    device::async_copy<4>(extra, row_pointer(p.lse, batch, head, query + row), valid ? 4 : 0);
    device::async_copy<4>(extra + 1, delta, valid ? 4 : 0);
  };
  load_queries(0, 0);
  device::async_copy_commit();

  float key_sums[kFragments][kDim / 8][4] = {}, value_sums[kFragments][kDim / 8][4] = {};
  pipeline<2>(tiles, 0, load_queries, [&](int tile, int i) {
    const int query = tile * BLOCK_M;
    const Band band = Band::of<true>(problem, key).from(query);
    const auto tile_queries = Layout::query(i);
    const int warp_rows = problem.keys - key;
    if (warp_rows > 0 && !band.misses(kOneHeadKeys, BLOCK_M)) {
      const Range existing = {query, smaller(query + BLOCK_M, problem.queries)};
      const HeadMask<T> mask(problem.mask, block.place, block.key_head);
      const bool masked = existing.end - query < BLOCK_M || !band.covers(kOneHeadKeys, BLOCK_M);
      float scores[kFragments][kTiles][4] = {}, grads[kFragments][kTiles][4] = {};
      multiply_rows(scores, Layout::key(), key, tile_queries, problem.exact);
      multiply_rows(grads, layout.value(), key, Layout::grad_out(i), problem.exact);
      Visible<kFragments, kTiles> visible;
      if (masked) {
        const auto live = mask.template live<BLOCK_M, true>(existing, query);
        visible = visible_scores<true, true, kFragments, kTiles>(band, mask, key, warp_rows, query, live);
      }
      const float factor = mask_scores<true, true>(scores, problem.scale * kLog2e, masked, visible, mask, key, query);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          uint32_t state[2];
          device::load_words(tile_queries.row_extra(n * 8 + lane_column() + e), state);
          const float shift = weight_shift(kLog2e * bits_to_float(state[0])), delta = bits_to_float(state[1]);
#pragma unroll
          for (int m = 0; m < kFragments; ++m) {
#pragma unroll
            for (int j = e; j < 4; j += 2) {
              scores[m][n][j] = weight(scores[m][n][j], factor, shift);
              grads[m][n][j] -= delta;
            }
          }
        }
      }
      if (masked) clear_where_zero(grads, scores);
      multiply_scores(grads, scores);
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            T* const to = layout.grads().at(key + m * kFragmentRows + half * 8 + lane_row(), n * 8 + lane_column());
            *reinterpret_cast<uint32_t*>(to) = device::pack<T>(grads[m][n][2 * half], grads[m][n][2 * half + 1]);
          }
        }
      }
      multiply_weights<T>(value_sums, scores, Layout::grad_out(i), 0, problem.exact, false, 0);
      device::hold_loads();
      multiply_weights<T>(key_sums, grads, tile_queries, 0, problem.exact, false, 0);
    }
    device::sync_block();  // dS^T of all warps
    // dQ: 16 rows and 16 columns at a time, the keys that any of the queries attends to
    const Range visible_keys =
        keys_in_window(problem, {query, smaller(query + BLOCK_M, problem.queries)}, problem.keys);
    const int row = warp % 2 * kFragmentRows, column = warp / 2 * 16;
    float sums[2][1][2][4] = {};
#pragma unroll 1
    for (int first = visible_keys.begin / 32 * 32; first < visible_keys.end; first += 32) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t a[4], b[4];
        load_left_down(a, layout.grads().at(first + half * 16, row), Layout::Grads::kStride);
        P::load_down(b, Layout::key().at(first + half * 16, column), Layout::Rows::kStride);
        P::multiply(sums[half][0][0], a, b, problem.exact);
        P::multiply(sums[half][0][1], a, b + 2, problem.exact);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[0][0][n][e] += sums[1][0][n][e];
    }
    const float factors[1][2] = {{problem.scale, problem.scale}};
    const auto [batch, head] = place();
    store_rows(row_pointer<T>(p.grad_query, batch, head, query + row) + column, p.grad_query.row,
               problem.queries - query - row, problem.key_dim - column, factors, sums[0]);
  });

  float factors[kFragments][2], ones[kFragments][2];
#pragma unroll
  for (int m = 0; m < kFragments; ++m) factors[m][0] = factors[m][1] = problem.scale, ones[m][0] = ones[m][1] = 1.0f;
  store_rows(row_pointer<T>(p.grad_value, block.place, block.key_head, key), p.grad_value.row, problem.keys - key,
             problem.value_dim, ones, value_sums);
  store_rows(row_pointer<T>(p.grad_key, block.place, block.key_head, key), p.grad_key.row, problem.keys - key,
             problem.key_dim, factors, key_sums);
}

}  // namespace fastgen::attention
