// The whole backward pass of problems whose scores of one head fit one tile, such as local windows: dQ, dK, dV and the
// gradient of a learned bias in one kernel, with five products, where the two or three kernels of backward.cuh and
// mask_gradient.cuh compute S and dP again in each, seven or nine products, and read their operands again.
//
//   for each head of the block (several only if they share a mask whose gradient is computed)
//     load Q, dO, K, V
//     S = Q K^T, dP = dO V^T, P, delta = rowsum(P * dP) - dlse     a warp has 16 queries and all keys in registers
//     dS = P (dP - delta);  bias gradient += dS;  dQ = dS K
//     P, dS to shared memory, in the place of K and V
//     dV = P^T dO, dK = dS^T Q                                     a warp has 16 keys
//
// P and dS are exchanged in the storage type, in which they enter the products anyway; 32 stores of 4 bytes and 8
// ldmatrix per warp and 64 x 64 tile of two bytes, where S^T and dP^T would take 32 mma and 20 ldmatrix (head dim 32),
// and the exponentials again. delta needs no O: all of a row is in registers.
//
// Every output is accumulated by one block in a fixed order, without atomics: results do not depend on the schedule.
#pragma once

#include "attention/backward.cuh"
#include "attention/mask_reduce.cuh"
#include "attention/one_tile.h"

namespace fastgen::attention {

// kPlain: no mask or dropout; kLearned: with the gradient of a float mask.
enum class OneTileKind { kPlain, kMasked, kLearned };

template <typename T, int kDim, int kRows>
struct OneTileLayout {
  using Rows = Tile<T, kDim>;
  using Scores = Tile<T, kRows>;
  static constexpr int kRow = row_bytes(kDim, sizeof(T)), kScoreRow = row_bytes(kRows, sizeof(T));
  int block_m, block_n;  // as in one_tile_plan

  explicit __device__ __forceinline__ OneTileLayout(const Problem& problem)
      : block_m((problem.queries + kFragmentRows - 1) / kFragmentRows * kFragmentRows),
        block_n((problem.keys + kOneTileChunk - 1) / kOneTileChunk * kOneTileChunk) {}
  static __device__ __forceinline__ T* at(int byte) { return reinterpret_cast<T*>(device::dynamic_shared() + byte); }
  __device__ __forceinline__ Rows query() const { return {at(0)}; }
  __device__ __forceinline__ Rows grad_out() const { return {at(block_m * kRow)}; }
  __device__ __forceinline__ Rows key() const { return {at(2 * block_m * kRow)}; }
  __device__ __forceinline__ Rows value() const { return {at((2 * block_m + block_n) * kRow)}; }
  static __device__ __forceinline__ Rows keys(const Rows& tile, int first) { return {tile.at(first, 0)}; }
  __device__ __forceinline__ Scores weights() const { return {at(2 * block_m * kRow)}; }
  __device__ __forceinline__ Scores grads() const { return {at(block_m * (2 * kRow + kScoreRow))}; }
  // One word per query: bit i if the query attends to any of keys 16 i ... 16 i + 15.
  __device__ __forceinline__ uint32_t* seen_keys(int row) const {
    return reinterpret_cast<uint32_t*>(query().row_extra(row));
  }
};

// Stores a left operand (Product::from_scores) to rows of a tile.
template <typename T, int kWidth>
__device__ __forceinline__ void store_left(const Tile<T, kWidth>& tile, int row, int column,
                                           const uint32_t (&left)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* const at = tile.at(row + half * 8 + lane_row(), column + lane_column());
    if constexpr (sizeof(T) == 4) {
      const uint32_t words[2] = {left[half], left[half + 2]};
      device::store_words(at, words);
    } else {
      *reinterpret_cast<uint32_t*>(at) = left[half];
      *reinterpret_cast<uint32_t*>(at + 8) = left[half + 2];
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

// What a warp has of its 16 queries and all keys: P, dP or dS, and delta.
template <typename T, int kDim, int kRows, bool kPlain>
struct OneTileRows {
  static constexpr int kChunks = kRows / kOneTileChunk, kTiles = kOneTileChunk / 8;
  static constexpr int kDepth = Product<T>::kDepth, kDepths = kOneTileChunk / kDepth;
  using Layout = OneTileLayout<T, kDim, kRows>;
  using Chunk = float[1][kTiles][4];

  Chunk weights[kChunks] = {};  // P, later with dropout
  Chunk grads[kChunks] = {};    // dP, later dS
  uint32_t kept[kChunks] = {};  // by dropout: bit 4 n + i of fragment [n][i]
  bool active[kChunks] = {};    // whether anything is visible
  bool masked[kChunks] = {};
  uint32_t live[kChunks] = {};  // see multiply_weights
  uint32_t seen[2] = {};        // of rows g and g + 8, see OneTileLayout
  float delta[2] = {};

  // P, dP and rowsum(P * dP). ``row``: the warp's first query; ``lse``: of rows g and g + 8, in units of log2.
  __device__ __forceinline__ void compute(const Problem& problem, const Layout& tiles, const HeadMask<T>& mask,
                                          int64_t first_row, int row, const float (&lse)[2]) {
    const int rows = problem.queries - row;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int key = c * kOneTileChunk;
      if (key >= problem.keys) continue;
      bool unmasked = key + kOneTileChunk <= problem.keys &&
                      window_covers(problem, {row, row + kFragmentRows}, {key, key + kOneTileChunk});
      if constexpr (!kPlain) unmasked = unmasked && mask.kind == MaskKind::kNone;
      Visible<1, kTiles> visible;
      if (!unmasked) {
        const auto exist = mask.template live<kOneTileChunk, kPlain>({0, problem.keys}, key);
        visible = visible_scores<kPlain, false, 1, kTiles>(problem, mask, row, rows, key, exist);
        if (!device::any_lane(visible.bits != 0)) continue;
      }
      active[c] = true;
      multiply_rows(weights[c], tiles.query(), row, tiles.keys(tiles.key(), key), problem.exact);
      multiply_rows(grads[c], tiles.grad_out(), row, tiles.keys(tiles.value(), key), problem.exact);
      mask_scores<kPlain, false>(weights[c], problem.scale * kLog2e, visible, mask, row, key);
      if (!kPlain && problem.dropout.seeds != nullptr) drop(problem, c, first_row, row);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = weights[c][0][n][i];
          score = weight(score, lse[i / 2]);
          // Masked keys may contain inf or NaN.
          delta[i / 2] += score == 0.0f ? 0.0f : score * grads[c][0][n][i];
        }
      }
      if constexpr (!kPlain) {
        masked[c] = !unmasked;
        live[c] = unmasked ? 0 : visible.columns();
        note_seen(visible, c);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) delta[half] = team_sum(delta[half], 4);
  }

  // dS of chunk c, and dropout of P.
  __device__ __forceinline__ void finish(const Problem& problem, int c) {
    const float factor = 1.0f / (1.0f - problem.dropout.p);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& probability = weights[c][0][n][i];
        float& grad = grads[c][0][n][i];
        grad = score_gradient(probability, grad, delta[i / 2]);
        if (!kPlain && problem.dropout.seeds != nullptr) {
          probability = (kept[c] >> (4 * n + i) & 1) != 0 ? probability * factor : 0.0f;
        }
      }
    }
  }

  // P and dS to shared memory, of all chunks that have keys.
  __device__ __forceinline__ void store(const Layout& tiles, int row) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c * kOneTileChunk >= tiles.block_n) continue;
#pragma unroll
      for (int k = 0; k < kDepths; ++k) {
        const int column = c * kOneTileChunk + k * kDepth;
        uint32_t left[4];
        Product<T>::from_scores(left, weights[c][0] + k * kDepth / 8);
        store_left(tiles.weights(), row, column, left);
        Product<T>::from_scores(left, grads[c][0] + k * kDepth / 8);
        store_left(tiles.grads(), row, column, left);
      }
    }
  }

 private:
  // Dropout of dP.
  __device__ __forceinline__ void drop(const Problem& problem, int c, int64_t first_row, int row) {
    const HeadDropout dropout(problem, first_row);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float factors[4];
      dropout.factors(factors, row, c * kOneTileChunk + n * 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        grads[c][0][n][i] *= factors[i];
        kept[c] |= factors[i] != 0.0f ? 1u << (4 * n + i) : 0u;
      }
    }
  }

  __device__ __forceinline__ void note_seen(const Visible<1, kTiles>& visible, int c) {
    uint32_t found = 0;  // bits 0 and 1: the two groups of 16 keys, row g; bits 2 and 3: row g + 8
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) found |= visible.at(0, n, i) ? 1u << (n / 2 + i / 2 * 2) : 0u;
    }
    found |= device::shuffle_xor(found, 1);
    found |= device::shuffle_xor(found, 2);
    seen[0] |= (found & 3u) << (2 * c), seen[1] |= (found >> 2 & 3u) << (2 * c);
  }
};

// The heads that a block processes: one, or those that its part of a mask's gradient is the sum over.
struct OneTileHeads {
  int owned_batch, owned_head, begin, end;
  int heads;       // iterated over; 1: only owned_head
  bool all_batch;  // iterates over the batch

  __device__ __forceinline__ OneTileHeads(const Problem& problem, const MaskGradient& gradient, bool learned) {
    const int owned = learned ? gradient.sizes[1] : problem.heads;
    owned_batch = static_cast<int>(blockIdx.x) / owned, owned_head = static_cast<int>(blockIdx.x) % owned;
    heads = owned == 1 ? problem.heads : 1;
    all_batch = learned && gradient.sizes[0] == 1;
    const int64_t all = learned ? int64_t{all_batch ? problem.batch : 1} * heads : 1;
    begin = static_cast<int>(all * blockIdx.y / gradient.splits);
    end = static_cast<int>(all * (blockIdx.y + 1) / gradient.splits);
  }
  __device__ __forceinline__ int batch(int i) const { return all_batch ? i / heads : owned_batch; }
  __device__ __forceinline__ int head(int i) const { return heads > 1 ? i % heads : owned_head; }
};

// 16 keys times the head dim of dV = P^T dO or dK = dS^T Q: sums += left^T right.
template <bool kPlain, typename T, int kDim, int kRows>
__device__ __forceinline__ void multiply_columns(float (&sums)[1][kDim / 8][4], const OneTileLayout<T, kDim, kRows>& tiles,
                                                 const Tile<T, kRows>& left, const Tile<T, kDim>& right, int key,
                                                 bool exact) {
  using P = Product<T>;
#pragma unroll 2
  for (int query = 0; query < tiles.block_m; query += kFragmentRows) {
    uint32_t live = 0;  // this lane's queries that attend to any of the keys; others count as zeros
    if constexpr (!kPlain) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t seen = *tiles.seen_keys(query + i / 2 * 8 + lane_column() + i % 2);
        live |= (seen >> (key / kFragmentRows) & 1u) << i;
      }
      if (!device::any_lane(live != 0)) continue;
    }
    const bool masked = !kPlain && device::any_lane(live != 15);
#pragma unroll
    for (int depth = 0; depth < kFragmentRows; depth += P::kDepth) {
      uint32_t a[4];
      load_left_down(a, left.at(query + depth, key), Tile<T, kRows>::kStride);
#pragma unroll
      for (int tile = 0; tile < kDim / 8; tile += 2) {
        uint32_t b[4];
        P::load_down(b, right.at(query + depth, tile * 8), Tile<T, kDim>::kStride);
        if (masked) P::keep_rows(b, live >> depth / 4);
        P::multiply(sums[0][tile], a, b, exact);
        P::multiply(sums[0][tile + 1], a, b + 2, exact);
      }
    }
  }
}

// gridDim = (heads of all batch entries, or of the mask; splits of the mask's gradient).
template <typename T, int kDim, int kRows, int kBlocks, OneTileKind kKind>
__global__ void __launch_bounds__(32 * kRows / kFragmentRows, kBlocks)
    attention_backward_one_tile(BackwardParams p, MaskGradient gradient) {
  constexpr bool kPlain = kKind == OneTileKind::kPlain, kLearned = kKind == OneTileKind::kLearned;
  using Layout = OneTileLayout<T, kDim, kRows>;
  using Scores = OneTileRows<T, kDim, kRows, kPlain>;
  constexpr int kChunks = Scores::kChunks, kTiles = Scores::kTiles;
  const Problem& problem = p.problem;
  const Layout tiles(problem);
  // From one lane, so that the compiler knows that branches on it do not diverge.
  const int warp = device::shuffle(static_cast<int>(threadIdx.x / 32), 0), row = warp * kFragmentRows;
  const OneTileHeads heads(problem, gradient, kLearned);
  float bias[kLearned ? kChunks : 1][kTiles][4] = {};

  for (int i = heads.begin; i < heads.end; ++i) {
    const int batch = heads.batch(i), head = heads.head(i);
    const int64_t first_row = (static_cast<int64_t>(batch) * problem.heads + head) * problem.queries;
    const auto load = [&](const typename Layout::Rows& tile, const Operand& operand, int rows, int count, int columns) {
      copy_rows(tile, rows, row_pointer<T>(operand, batch, head, 0), operand.row, columns,
                [&](int at) { return at < count; });
    };
    load(tiles.query(), p.query, tiles.block_m, problem.queries, problem.key_dim);
    load(tiles.key(), p.key, tiles.block_n, problem.keys, problem.key_dim);
    load(tiles.grad_out(), p.grad_out, tiles.block_m, problem.queries, problem.value_dim);
    load(tiles.value(), p.value, tiles.block_n, problem.keys, problem.value_dim);
    device::async_copy_commit();
    float lse[2] = {-INFINITY, -INFINITY}, grad_lse[2] = {0.0f, 0.0f};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = row + half * 8 + lane_row();
      if (query >= problem.queries) continue;
      lse[half] = kLog2e * *row_pointer(p.lse, batch, head, query);
      if (p.grad_lse.data != nullptr) grad_lse[half] = *row_pointer(p.grad_lse, batch, head, query);
    }
    device::async_copy_wait<0>();
    device::sync_block();

    Scores scores;
    if (row < tiles.block_m) {
      const HeadMask<T> mask(problem.mask, batch, head);
      scores.compute(problem, tiles, mask, first_row, row, lse);
      float sums[1][kDim / 8][4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = row + half * 8 + lane_row();
        scores.delta[half] -= grad_lse[half];
        if (lane_column() != 0) continue;
        if constexpr (!kPlain) *tiles.seen_keys(query) = query < problem.queries ? scores.seen[half] : ~0u;
        if (!kLearned && query < problem.queries) p.delta[first_row + query] = scores.delta[half];
      }
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
        multiply_weights<T>(sums, scores.grads[c], tiles.keys(tiles.key(), c * kOneTileChunk), 0, problem.exact,
                            scores.masked[c], scores.live[c]);
      }
      const float factors[1][2] = {{problem.scale, problem.scale}};
      store_rows(row_pointer<T>(p.grad_query, batch, head, row), p.grad_query.row, problem.queries - row,
                 problem.key_dim, factors, sums);
    }
    device::sync_block();  // all warps have left K and V
    if (row < tiles.block_m) scores.store(tiles, row);
    device::sync_block();

    // The products of 16 keys for dV, and for dK.
    const int tasks = 2 * static_cast<int>(ceil_div(problem.keys, kFragmentRows));
    for (int task = warp; task < tasks; task += static_cast<int>(blockDim.x / 32)) {
      const int key = task / 2 * kFragmentRows;
      const bool of_key = task % 2 != 0;
      float sums[1][kDim / 8][4] = {};
      multiply_columns<kPlain>(sums, tiles, of_key ? tiles.grads() : tiles.weights(),
                               of_key ? tiles.query() : tiles.grad_out(), key, problem.exact);
      const Result& result = of_key ? p.grad_key : p.grad_value;
      const float factor = of_key ? problem.scale : 1.0f;
      const float factors[1][2] = {{factor, factor}};
      store_rows(row_pointer<T>(result, batch, head, key), result.row, problem.keys - key,
                 of_key ? problem.key_dim : problem.value_dim, factors, sums);
    }
    if (kLearned && i + 1 < heads.end) device::sync_block();  // all warps have left the tiles
  }

  if constexpr (kLearned) {
    const int64_t corner = int64_t{blockIdx.x} * problem.queries;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int query = row + k / 2 * 8 + lane_row(), key = c * kOneTileChunk + n * 8 + lane_column() + k % 2;
          if (query >= problem.queries || key >= problem.keys) continue;
          store_part<T>(gradient, (corner + query) * problem.keys + key, bias[c][n][k]);
        }
      }
    }
  }
}

}  // namespace fastgen::attention
