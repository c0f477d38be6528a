// Forward pass of wide heads, whose output is too wide for the registers of one warp: eight warps share the scores of a
// tile, so that each score is computed once, and each warp accumulates an eighth of the columns for all rows.
//
//   for each visible key tile                              load K, V    pipeline: below
//     S = scale * Q K^T + mask                             scores       warp w: 16 rows, half of the keys
//     m' = max(m, rowmax S), P = 2^(S - m')                softmax      the two warps of a row exchange maxima
//     P -> shared memory                                   weights      with the factors 2^(m - m') of O
//     O = O 2^(m - m') + dropout(P) V                      accumulate   warp w: 64 rows, columns w * kColumns ...
//   out = O / l, lse = m + log l                           epilogue
//
//            BLOCK_N keys                 value dim
//          +------+------+        +---+---+---+-----+---+
//          | 0    | 4    |        | w | w | w |     | w |
//   rows   | 1    | 5    |   x    | a | a | a | ... | a |      P is the left operand of every warp
//          | 2    | 6    |        | r | r | r |     | r |
//          | 3    | 7    |        | p | p | p |     | p |
//          +------+------+        | 0 | 1 | 2 |     | 7 |
//               S, P              +---+---+---+-----+---+
//
// The products of S are divided once more: warps w and w ^ 1 multiply one half of the depth each, for the rows of
// both, and exchange partial sums, which takes a quarter fewer loads of operands.
//
// With one stage, K and V are copied while the other one is in use: V of tile i during its scores, K of tile i + 1
// during the products with V of tile i. With two stages, both are a tile ahead.
#pragma once

#include "attention/dropout.cuh"
#include "attention/scheduler.cuh"
#include "attention/softcap.cuh"
#include "attention/softmax.cuh"
#include "attention/store.cuh"
#include "attention/wide_tile.cuh"
#include "common/math.h"
#include "device/barrier.cuh"
#include "device/math.cuh"
#include "device/shared.cuh"

namespace fastgen::attention {

// Shared memory: Q, P with floats per row, partial scores, live keys, then the stages of (K, V).
template <typename T, int kKeyDim, int kValueDim>
struct WideForwardLayout {
  static constexpr int BLOCK_M = kWideForward.owned, BLOCK_N = kWideForward.iterated;
  static constexpr int kThreads = 32 * kWideWarps, kColumns = kValueDim / kWideWarps;
  static constexpr int kRowFragments = BLOCK_M / kFragmentRows, kKeyParts = kWideWarps / kRowFragments;
  static constexpr int kPartKeys = BLOCK_N / kKeyParts;  // of a warp's scores
  static_assert(kKeyParts == 2 && kPartKeys == 16 && kColumns % 16 == 0, "two warps share a row of scores");
  using Query = Tile<T, kKeyDim>;
  using Key = Tile<T, kKeyDim>;
  using Value = Tile<T, kValueDim>;
  using Weights = Tile<T, BLOCK_N>;
  static constexpr int kQueryBytes = BLOCK_M * row_bytes(kKeyDim, sizeof(T));
  static constexpr int kKeyBytes = BLOCK_N * row_bytes(kKeyDim, sizeof(T));
  static constexpr int kStageBytes = kKeyBytes + BLOCK_N * row_bytes(kValueDim, sizeof(T));
  static constexpr int kStateBytes = wide_forward_state_bytes({kKeyDim, kValueDim}, sizeof(T));

  static __device__ __forceinline__ Query query() { return {reinterpret_cast<T*>(device::dynamic_shared())}; }
  static __device__ __forceinline__ Weights weights() {
    return {reinterpret_cast<T*>(device::dynamic_shared() + kQueryBytes)};
  }
  // Of row ``row``: maxima or sums of the two warps, and the factor of O, in the padding of the weights.
  static __device__ __forceinline__ float* state(int row) { return weights().row_extra(row); }
  static __device__ __forceinline__ float* partial_scores(int warp) {
    unsigned char* begin = device::dynamic_shared() + kQueryBytes + BLOCK_M * row_bytes(BLOCK_N, sizeof(T));
    return reinterpret_cast<float*>(begin) + warp * kFragmentRows * kPartKeys;
  }
  static __device__ __forceinline__ uint32_t* live() { return reinterpret_cast<uint32_t*>(partial_scores(kWideWarps)); }
  static __device__ __forceinline__ unsigned char* stage(int i) {
    return device::dynamic_shared() + kStateBytes + i * kStageBytes;
  }
  static __device__ __forceinline__ Key key(int i) { return {reinterpret_cast<T*>(stage(i))}; }
  static __device__ __forceinline__ Value value(int i) { return {reinterpret_cast<T*>(stage(i) + kKeyBytes)}; }
};

// Online softmax of 16 rows that two warps share, half of the keys each: softmax.cuh.
struct SharedSoftmax {
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0.0f, 0.0f};  // over this lane's keys

  // The maxima of this warp's scores, in all four lanes of a row.
  template <int kTiles>
  static __device__ __forceinline__ void maxima(const float (&scores)[kTiles][4], float (&top)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = -INFINITY;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        top[half] = fmaxf(top[half], fmaxf(scores[tile][2 * half], scores[tile][2 * half + 1]));
      }
      top[half] = fmaxf(top[half], device::shuffle_xor(top[half], 1));
      top[half] = fmaxf(top[half], device::shuffle_xor(top[half], 2));
    }
  }

  // scores = exp2(factor * scores - row_max), with the maximum updated by ``top``, the maximum of the scores of both
  // warps. ``rescale``: the factor for earlier weights and sums.
  template <int kTiles>
  __device__ __forceinline__ void update(float (&scores)[kTiles][4], float factor, const float (&top)[2],
                                         float (&rescale)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float largest = fmaxf(row_max[half], factor * top[half]), shift = softmax_shift(largest);
      rescale[half] = device::exp2_approx(row_max[half] - shift);
      row_max[half] = largest;
      float sum = row_sum[half] * rescale[half];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[tile][i] = device::exp2_approx(fmaf(scores[tile][i], factor, -shift));
          sum += scores[tile][i];
        }
      }
      row_sum[half] = sum;
    }
  }
};

// gridDim = (query tiles of all heads, splits of their keys).
template <typename T, int kKeyDim, int kValueDim, bool kPlain>
__global__ void __launch_bounds__(WideForwardLayout<T, kKeyDim, kValueDim>::kThreads, 1)
    attention_forward_wide(ForwardParams p) {
  using Layout = WideForwardLayout<T, kKeyDim, kValueDim>;
  constexpr int BLOCK_M = Layout::BLOCK_M, BLOCK_N = Layout::BLOCK_N, kColumns = Layout::kColumns;
  constexpr int kTiles = Layout::kPartKeys / 8, kFragments = Layout::kRowFragments;
  using Tiles = KeyTiles<T, BLOCK_N, kPlain>;
  const Problem& problem = p.problem;
  const int warp = static_cast<int>(threadIdx.x / 32), part = warp / kFragments;
  const int warp_row = warp % kFragments * kFragmentRows, warp_key = part * Layout::kPartKeys;
  const int half_depth = warp % 2;  // this warp's half, and its rows among those of warps w and w ^ 1
  const int first_column = warp * kColumns;
  const QueryBlock block(problem, blockIdx.x, BLOCK_M, MayPack<!kPlain>{});
  if (!kPlain && block.rows() <= 0) return;
  Tiles tiles(problem, block);
  if (p.splits > 1) {
    const int tiles_each = (tiles.end_tile - tiles.first_tile + p.splits - 1) / p.splits;
    tiles.first_tile += static_cast<int>(blockIdx.y) * tiles_each;
    tiles.end_tile = smaller(tiles.end_tile, tiles.first_tile + tiles_each);
  }
  const int row = block.queries.begin + warp_row, warp_rows = block.rows() - warp_row;
  // The window as the rows of the warp see it, and as those of the block do.
  const Band window = Band::of<false>(problem, row), block_window = Band::of<false>(problem, block.queries.begin);

  const auto load_keys = [&](const typename Tiles::Index& tile, int stage) {
    copy_rows(Layout::key(stage), BLOCK_N, row_pointer<T>(p.key, block.key_batch, block.key_head, tile.key()),
              p.key.row, problem.key_dim, [&](int row) { return tile.is_live(row); });
  };
  const auto load_values = [&](const typename Tiles::Index& tile, int stage) {
    copy_rows(Layout::value(stage), BLOCK_N, row_pointer<T>(p.value, block.key_batch, block.key_head, tile.key()),
              p.value.row, problem.value_dim, [&](int row) { return tile.is_live(row); });
  };
  const bool ahead = p.stages == 2;
  typename Tiles::Index tile = tiles.first();
  copy_rows(Layout::query(), BLOCK_M, row_pointer<T>(p.query, block.batch, block.head, block.queries.begin),
            p.query.row, problem.key_dim, [&](int row) { return row < block.rows(); });
  load_keys(tile, 0);
  if (ahead) load_values(tile, 0);
  device::async_copy_commit();

  SharedSoftmax softmax;
  float out[kFragments][kColumns / 8][4] = {};
  bool more = true;
  for (int stage = 0; more; stage ^= ahead ? 1 : 0) {
    const typename Tiles::Index current = tile;
    tile = tiles.next(current);
    more = tiles.contains(tile);
    // K of this tile is visible, and with two stages V; all warps have left V, P and their state of the previous tile.
    device::async_copy_wait<0>();
    device::sync_block();
    if (!ahead) {
      load_values(current, stage);
    } else if (more) {
      load_keys(tile, stage ^ 1), load_values(tile, stage ^ 1);
    }
    device::async_copy_commit();

    // scores
    const int key = current.key() + warp_key;
    const bool masked = tiles.is_masked(current, block_window.from(current.key()), BLOCK_M);
    const auto live = static_cast<LiveBits<8 * kTiles>>(current.live >> warp_key) & full<8 * kTiles>();
    Visible<1, kTiles> visible;
    if (masked) {
      visible = visible_scores<kPlain, false, 1, kTiles>(window.from(key), tiles.mask, row, warp_rows, key, live);
    }
    float scores[1][kTiles][4], parts[2][kTiles][4] = {};
    multiply_depth<kKeyDim / 2>(parts, Layout::query(), warp_row - half_depth * kFragmentRows, Layout::key(stage),
                                warp_key, half_depth * (kKeyDim / 2));
    exchange_halves(scores, parts, half_depth, Layout::partial_scores(warp), Layout::partial_scores(warp ^ 1),
                    1 + kFragments + warp / 2);
    const float scale = cap_scores<kPlain>(scores, problem);
    const float factor = mask_scores<kPlain, false>(scores, scale, masked, visible, tiles.mask, row, key);

    // softmax
    float top[2], rescale[2];
    SharedSoftmax::maxima(scores[0], top);
    if (lane_column() == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) Layout::state(warp_row + half * 8 + lane_row())[part] = top[half];
    }
    device::sync_named(1 + warp % kFragments, 64);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = fmaxf(top[half], Layout::state(warp_row + half * 8 + lane_row())[1 - part]);
    }
    softmax.update(scores[0], factor, top, rescale);

    // weights
    if constexpr (!kPlain) {
      if (problem.dropout.seeds != nullptr) {
        HeadDropout(problem, block.first_row).template kept<1, kTiles>(row, key).apply(scores);
      }
      if (masked) store_live(Layout::live(), warp, visible.columns(live));
    }
    if (part == 0 && lane_column() == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) Layout::state(warp_row + half * 8 + lane_row())[2] = rescale[half];
    }
    store_weights(Layout::weights(), warp_row, warp_key, scores);
    // P, the factors and V are visible; all warps have left K.
    if (!ahead) device::async_copy_wait<0>();
    device::sync_block();
    if (!ahead && more) load_keys(tile, stage);
    device::async_copy_commit();

    // accumulate
    if (first_column < problem.value_dim) {
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          rescale[half] = Layout::state(m * kFragmentRows + half * 8 + lane_row())[2];
        }
        // The factors are 1 once the row's maximum has been found.
        if (device::any_lane(rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
          for (auto& sums : out[m]) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[e] *= rescale[e / 2];
          }
        }
      }
      const uint32_t attended = kPlain || !masked ? 0 : load_live<kFragments, Layout::kKeyParts>(Layout::live());
      multiply_shared_weights(out, Layout::weights(), Layout::value(stage), first_column, !kPlain && masked, attended);
    }
  }

  // epilogue: the sums of both warps of a row
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& sum = softmax.row_sum[half];
    sum += device::shuffle_xor(sum, 1);
    sum += device::shuffle_xor(sum, 2);
    if (lane_column() == 0) Layout::state(warp_row + half * 8 + lane_row())[part] = sum;
  }
  device::sync_block();
  float inverse[kFragments][2];
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* sums = Layout::state(m * kFragmentRows + half * 8 + lane_row());
      const float sum = sums[0] + sums[1];
      inverse[m][half] = p.splits > 1 ? 1.0f : sum == 0.0f ? 0.0f : 1.0f / sum;  // 0: a fully masked row
    }
  }
  // Of this split: the head's first row among the workspace's.
  const int64_t all_rows = int64_t{problem.batch} * problem.heads * problem.queries;
  const int64_t first_row = blockIdx.y * all_rows + block.first_row;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int down = half * 8 + lane_row();
    if (part == 0 && down < warp_rows && lane_column() == 0) {
      const float* sums = Layout::state(warp_row + down);
      const float sum = sums[0] + sums[1];
      const float largest = softmax.row_max[half];
      if (p.splits > 1) {
        float* state = p.parts + p.splits * all_rows * problem.value_dim + (first_row + row + down) * 2;
        state[0] = largest, state[1] = sum;
        continue;
      }
      // -inf for a fully masked row; NaN propagates.
      const float lse = sum > 0.0f ? largest * kLn2 + log_float(sum) : sum == 0.0f ? -INFINITY : sum;
      *row_pointer(p.lse, block.batch, block.head, row + down) = lse;
    }
  }
  const int columns = problem.value_dim - first_column;
  if (p.splits > 1) {
    float* const sums = p.parts + (first_row + block.queries.begin) * problem.value_dim + first_column;
    store_rows(sums, problem.value_dim, block.rows(), columns, inverse, out);
    return;
  }
  store_rows(row_pointer<T>(p.out, block.batch, block.head, block.queries.begin) + first_column, p.out.row,
             block.rows(), columns, inverse, out);
}

}  // namespace fastgen::attention
