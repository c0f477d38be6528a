// The first half of attention_backward_one_tile: its tiles in shared memory, and a warp's rows of scores.
#pragma once

#include "attention/backward.cuh"
#include "attention/one_tile.h"

namespace fastgen::attention {

// kPlain: no mask or dropout; kLearned: with the gradient of a float mask, without dropout.
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
  // Of a learned bias: this block's rows, in units of log2, -inf where masked. A lane reads what it has written.
  __device__ __forceinline__ float* bias(int row, int column) const {
    const int begin = 2 * block_m * kRow + larger(2 * block_n * kRow, 2 * block_m * kScoreRow);
    return reinterpret_cast<float*>(device::dynamic_shared() + begin) + row * one_tile_bias_columns(kRows) + column;
  }
  // One word per query: bit c if the query attends to any key of chunk c.
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

// What a warp has of its 16 queries and all keys: P, dP or dS, and delta.
template <typename T, int kDim, int kRows, OneTileKind kKind>
struct OneTileRows {
  static constexpr bool kPlain = kKind == OneTileKind::kPlain, kLearned = kKind == OneTileKind::kLearned;
  static constexpr int kChunks = kRows / kOneTileChunk, kTiles = kOneTileChunk / 8;
  static constexpr int kDepth = Product<T>::kDepth, kDepths = kOneTileChunk / kDepth;
  static constexpr int kColumnBits = 2 * kTiles;  // of a lane and chunk, see multiply_weights
  static constexpr bool kRare = sizeof(T) == 4;   // products in float32, for the build time
  static constexpr uint32_t kAllLive = (1u << kColumnBits) - 1;
  using Layout = OneTileLayout<T, kDim, kRows>;
  using Chunk = float[1][kTiles][4];

  Chunk weights[kChunks];     // P, later with dropout
  Chunk grads[kChunks];       // dP, later dS
  uint32_t kept[kChunks];     // by dropout: bit 4 n + i of fragment [n][i]
  bool active[kChunks] = {};  // whether anything is visible
  uint32_t live = 0;          // columns with visible scores or without a key, kColumnBits for each chunk
  float delta[2];
  bool regular;  // all factors of visible scores are finite, and so are those of masked ones

  // Masks of a chunk. ``visible`` is written where the result is true: something has to be masked.
  __device__ __forceinline__ bool find_visible(Visible<1, kTiles>& visible, const Problem& problem,
                                               const HeadMask<T>& mask, int row, int c) {
    const int key = c * kOneTileChunk;
    const Band band = Band::of<false>(problem, row).from(key);
    active[c] = key < problem.keys && !band.misses(kFragmentRows, kOneTileChunk);
    if (!active[c]) return false;
    const auto exist = mask.template live<kOneTileChunk, kPlain>({0, problem.keys}, key);
    const bool masked = kLearned || exist != full<kOneTileChunk>() || !band.covers(kFragmentRows, kOneTileChunk) ||
                        (!kPlain && mask.has_entries());
    if (masked) {
      visible = visible_scores<kPlain, false, 1, kTiles>(band, mask, row, problem.queries - row, key, exist);
      if constexpr (!kPlain) active[c] = device::any_lane(visible.any());
    }
    return masked;
  }

  // What multiply_weights and multiply_columns need to know of a chunk. ``seen``: by rows g and g + 8, see
  // OneTileLayout.
  __device__ __forceinline__ void note_visible(uint32_t (&seen)[2], const Visible<1, kTiles>& visible, bool masked,
                                               const Problem& problem, int c) {
    uint32_t columns = kAllLive, rows = 3;
    if (masked) {
      const int keys = problem.keys - c * kOneTileChunk;
      columns = visible.columns(full<kOneTileChunk>() >> (keys < kOneTileChunk ? kOneTileChunk - keys : 0)), rows = 0;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) rows |= visible.at(0, n, i) ? 1u << i / 2 : 0u;
      }
      rows |= device::shuffle_xor(rows, 1);
      rows |= device::shuffle_xor(rows, 2);
    }
    live |= columns << (kColumnBits * c);
    seen[0] |= (rows & 1u) << c, seen[1] |= (rows >> 1) << c;
  }
  __device__ __forceinline__ void store_seen(const uint32_t (&seen)[2], const Problem& problem, const Layout& tiles,
                                             int row) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = row + half * 8 + lane_row();
      if (lane_column() == 0) *tiles.seen_keys(query) = query < problem.queries ? seen[half] : ~0u;
    }
  }
  __device__ __forceinline__ uint32_t live_columns(int c) const { return live >> (kColumnBits * c) & kAllLive; }

  // This lane's part of a chunk, to its place in the tile of the bias.
  static __device__ __forceinline__ void put_bias(const float (&values)[kTiles][4], const Layout& tiles, int c,
                                                  int row) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t words[2] = {float_to_bits(values[n][2 * half]), float_to_bits(values[n][2 * half + 1])};
        device::store_words(tiles.bias(row + half * 8 + lane_row(), c * kOneTileChunk + n * 8 + lane_column()), words);
      }
    }
  }

  // The tile of a learned bias, once for all heads that share it.
  __device__ __forceinline__ void load_bias(const Problem& problem, const Layout& tiles, const HeadMask<T>& mask,
                                            int row) {
    uint32_t seen[2] = {};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int key = c * kOneTileChunk;
      Visible<1, kTiles> visible;
      find_visible(visible, problem, mask, row, c);
      if (!active[c]) continue;
      Chunk terms = {};
      mask_scores<false, false>(terms, 1.0f, true, visible, mask, row, key);
      note_visible(seen, visible, true, problem, c);
      put_bias(terms[0], tiles, c, row);
    }
    store_seen(seen, problem, tiles, row);
  }

  // P and dP, and delta = rowsum(P * dP). ``row``: the warp's first query; ``shift``: of weight(), for rows g and
  // g + 8.
  __device__ __forceinline__ void compute(const Problem& problem, const Layout& tiles, const HeadMask<T>& mask,
                                          int64_t first_row, int row, const float (&shift)[2]) {
    uint32_t seen[2] = {};
    if constexpr (!kLearned) live = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int key = c * kOneTileChunk;
      clear(weights[c]), clear(grads[c]);
      Visible<1, kTiles> visible;
      bool masked = false;
      if constexpr (!kLearned) masked = find_visible(visible, problem, mask, row, c);
      if (!active[c]) continue;
      multiply_rows<kRare>(weights[c], tiles.query(), row, tiles.keys(tiles.key(), key), problem.exact);
      multiply_rows<kRare>(grads[c], tiles.grad_out(), row, tiles.keys(tiles.value(), key), problem.exact);
      float factor = problem.scale * kLog2e;
      if constexpr (kLearned) {
        add_bias(tiles, c, row, factor);
        factor = 1.0f;
      } else {
        factor = mask_scores<kPlain, false>(weights[c], factor, masked, visible, mask, row, key);
      }
      if (drops(problem)) drop(problem, c, first_row, row);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[c][0][n][i] = weight(weights[c][0][n][i], factor, shift[i / 2]);
      }
      if constexpr (!kPlain && !kLearned) note_visible(seen, visible, masked, problem, c);
    }
    if constexpr (!kPlain && !kLearned) store_seen(seen, problem, tiles, row);
    find_delta();
    // Where a masked key contains inf or NaN, or a visible one, so does its row's sum.
    regular = device::all_lanes(fabsf(delta[0]) < INFINITY && fabsf(delta[1]) < INFINITY);
    if (regular) return;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if constexpr (kLearned) {
        if (active[c]) hide(tiles, c, row);
      }
      clear_where_zero(grads[c], weights[c]);
    }
    find_delta();
  }

  // dS of chunk c, and dropout of P.
  __device__ __forceinline__ void finish(const Problem& problem, int c) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) grads[c][0][n][i] -= delta[i / 2];
    }
    if (!regular) clear_where_zero(grads[c], weights[c]);
    const float factor = 1.0f / (1.0f - problem.dropout.p);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) grads[c][0][n][i] *= weights[c][0][n][i];
    }
    if (!drops(problem)) return;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[c][0][n][i] *= (kept[c] >> (4 * n + i) & 1) != 0 ? factor : 0.0f;
    }
  }

  static __device__ __forceinline__ bool drops(const Problem& problem) {
    return kKind == OneTileKind::kMasked && problem.dropout.seeds != nullptr;
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
  __device__ __forceinline__ void find_delta() {
    delta[0] = delta[1] = 0.0f;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) delta[i / 2] += weights[c][0][n][i] * grads[c][0][n][i];
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) delta[half] = team_sum(delta[half], 4);
  }

  template <typename Body>
  __device__ __forceinline__ void for_bias(const Layout& tiles, int c, int row, Body&& body) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[2];
        device::load_words(tiles.bias(row + half * 8 + lane_row(), c * kOneTileChunk + n * 8 + lane_column()), words);
#pragma unroll
        for (int i = 0; i < 2; ++i) body(weights[c][0][n][2 * half + i], bits_to_float(words[i]));
      }
    }
  }
  __device__ __forceinline__ void add_bias(const Layout& tiles, int c, int row, float factor) {
    for_bias(tiles, c, row, [&](float& score, float term) { score = fmaf(score, factor, term); });
  }
  // P = 0 where masked, although the score was NaN.
  __device__ __forceinline__ void hide(const Layout& tiles, int c, int row) {
    for_bias(tiles, c, row, [](float& weight, float term) { weight = term == -INFINITY ? 0.0f : weight; });
  }

  // Dropout of dP.
  __device__ __forceinline__ void drop(const Problem& problem, int c, int64_t first_row, int row) {
    const HeadDropout dropout(problem, first_row);
    const auto found = dropout.template kept<1, kTiles>(row, c * kOneTileChunk);
    found.apply(grads[c]);
    kept[c] = found.bits[0];
  }
};

}  // namespace fastgen::attention
