// Forward-mode derivative (JVP), in one pass over the keys and O(N) memory. With P = 2^(S - lse), the tangent of the
// scores W = scale * (Gq K^T + Q Gk^T) + Gb, dropout M, and out and lse of the forward pass:
//
//   load Q, Gq
//   for each visible key tile                      load K, V, Gk, Gv
//     S = scale * Q K^T + mask, W                  scores
//     P = 2^(S - lse), w += rowsum(P W)            softmax
//     out' += (P W M) V + (P M) Gv                 accumulate
//   out' -= w out, lse' = w                        epilogue:  (P (W - w) M) V = (P W M) V - w out
//
// With a softcap, W = derivative * scale * (Gq K^T + Q Gk^T) + Gb (softcap.cuh).
//
// Blocks and warps as in forward.cuh, one fragment of 16 queries per warp.
// gridDim = (query tiles of all heads, slices of the value dim).
#pragma once

#include "attention/dropout.cuh"
#include "attention/pipeline.cuh"
#include "attention/softcap.cuh"
#include "attention/softmax.cuh"
#include "attention/store.cuh"
#include "attention/tangent_tiles.cuh"
#include "common/reduce.cuh"
#include "device/shared.cuh"

namespace fastgen::attention {

// Shared memory: (Q, Gq), then the stages of (K, Gk, V, Gv).
template <typename T, int kKeyDim, int kValueDim>
struct TangentLayout {
  static constexpr TileShape kShape = tangent_shape({kKeyDim, kValueDim}, sizeof(T));
  static_assert(kShape.fragments == 1, "a warp owns 16 rows");
  static constexpr int BLOCK_N = kShape.iterated;
  static constexpr int kThreads = 32 * kShape.warps, kColumns = smaller(kValueDim, kShape.columns);
  using Queries = QueryTangentTile<T, kKeyDim, 0>;
  using Keys = KeyTangentTile<T, kKeyDim, kColumns>;

  static __device__ __forceinline__ Queries queries() {
    return {device::dynamic_shared(), static_cast<int>(blockDim.x / 32) * kFragmentRows};
  }
  static __device__ __forceinline__ Keys keys(int i) {
    const int stage = i * BLOCK_N * Keys::kBytes;
    return {device::dynamic_shared() + queries().rows * Queries::kBytes + stage, BLOCK_N};
  }
};

template <typename T, int kKeyDim, int kValueDim, bool kPlain>
__global__ void __launch_bounds__(TangentLayout<T, kKeyDim, kValueDim>::kThreads, 1)
    attention_tangent(TangentParams p) {
  using Layout = TangentLayout<T, kKeyDim, kValueDim>;
  constexpr int BLOCK_N = Layout::BLOCK_N, kTiles = BLOCK_N / 8, kColumns = Layout::kColumns;
  using Tiles = KeyTiles<T, BLOCK_N, kPlain>;
  const Problem& problem = p.problem;
  const auto queries = Layout::queries();
  // Beside a wide output there is no register for it.
  const int warp_row = (kColumns > 128 ? static_cast<int>(threadIdx.x / 32) : uniform_warp()) * kFragmentRows;
  const int first_column = static_cast<int>(blockIdx.y) * kColumns;
  const QueryBlock block(problem, blockIdx.x, queries.rows, MayPack<!kPlain>{});
  if (!kPlain && block.rows() <= 0) return;
  const Tiles tiles(problem, block);
  const HeadMask<T> mask_tangent(p.tangents.mask, block.batch, block.head);
  const int row = block.queries.begin + warp_row, warp_rows = block.rows() - warp_row;

  using Source = KeyTangentSource<T, kKeyDim, kColumns, BLOCK_N, Layout::kShape.warps>;
  const Source source(p, p.tangents, block.key_batch, block.key_head, first_column);
  const auto load_keys = [&](const typename Tiles::Index& tile, int i) {
    const auto is_live = [&](int row) { return tile.is_live(row); };
    if constexpr (kColumns <= 128) {
      source.copy(Layout::keys(i), p, p.tangents, tile.key(), tile.all_live(), is_live);
    } else {  // no registers for the addresses of four operands beside a wide output
      copy_tile(Layout::keys(i), p, p.tangents, block.key_batch, block.key_head, tile.key(), first_column, is_live);
    }
  };
  const typename Tiles::Index first = tiles.first();
  copy_tile(queries, p, p.tangents, block.batch, block.head, block.queries.begin,
            [&](int row) { return row < block.rows(); });
  load_keys(first, 0);
  device::async_copy_commit();

  const Band window = Band::of<false>(problem, row);
  float shift[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int down = half * 8 + lane_row();
    const float lse = down < warp_rows ? kLog2e * *row_pointer(p.lse, block.batch, block.head, row + down) : -INFINITY;
    shift[half] = weight_shift(lse);
  }
  float sums[1][kColumns / 8][4] = {}, mean[2] = {0.0f, 0.0f};
  const int stages = Layout::kShape.stages == 1 ? 1 : p.stages;
  pipeline(stages, tiles, first, load_keys, [&](const typename Tiles::Index& tile, int i) {
    const int key = tile.key();
    const Band band = window.from(key);
    if (warp_rows <= 0 || band.misses(kFragmentRows, BLOCK_N)) return;
    const bool masked = tiles.is_masked(tile, band, kFragmentRows) || mask_tangent.kind != MaskKind::kNone;
    Visible<1, kTiles> visible;
    const auto find_visible = [&] {
      visible = visible_scores<kPlain, false, 1, kTiles>(band, tiles.mask, row, warp_rows, key, tile.live);
    };
    if (!kPlain && masked) {
      find_visible();
      if (!device::any_lane(visible.any())) return;
    }
    // scores
    const auto keys = Layout::keys(i);
    float scores[1][kTiles][4] = {}, direction[1][kTiles][4] = {};
    multiply_rows(scores, queries.query(), warp_row, keys.key(), problem.exact);
    multiply_direction(direction, queries, warp_row, keys, p.tangents, problem.exact);
    if (kPlain && masked) find_visible();
    float direction_scale;
    const float scale = cap_direction<kPlain>(scores, direction, problem, direction_scale);
    const float factor = mask_scores<kPlain, false>(scores, scale, masked, visible, tiles.mask, row, key);
    mask_direction<false>(direction, direction_scale, masked, visible, mask_tangent, row, key);
    // softmax: scores = P M, direction = P W M
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[0][n][e] = weight(scores[0][n][e], factor, shift[e / 2]);
    }
    if (masked) clear_where_zero(direction, scores);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        direction[0][n][e] *= scores[0][n][e];
        mean[e / 2] += direction[0][n][e];
      }
    }
    if constexpr (!kPlain) {
      if (problem.dropout.seeds != nullptr) {
        const auto kept = HeadDropout(problem, block.first_row).template kept<1, kTiles>(row, key);
        kept.apply(scores), kept.apply(direction);
      }
    }
    // accumulate
    const uint32_t live = kPlain || !masked ? 0 : visible.columns(tile.live);
    multiply_weights<T>(sums, direction, keys.value(), 0, problem.exact, !kPlain && masked, live);
    if (p.tangents.value.data != nullptr) {
      multiply_weights<T>(sums, scores, keys.tangent_value(), 0, problem.exact, !kPlain && masked, live);
    }
  });

  // epilogue
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    mean[half] = team_sum(mean[half], 4);
    const int down = half * 8 + lane_row();
    if (down >= warp_rows) continue;
    if (lane_column() == 0 && blockIdx.y == 0) {
      *row_pointer(p.tangent_lse, block.batch, block.head, row + down) = mean[half];
    }
    const T* out = row_pointer<T>(p.out, block.batch, block.head, row + down) + first_column;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = n * 8 + lane_column() + e;
        if (first_column + column < problem.value_dim) {
          sums[0][n][2 * half + e] -= mean[half] * device::to_float(out[column]);
        }
      }
    }
  }
  const float ones[1][2] = {{1.0f, 1.0f}};
  store_rows(row_pointer<T>(p.tangent_out, block.batch, block.head, row) + first_column, p.tangent_out.row, warp_rows,
             problem.value_dim - first_column, ones, sums);
}

}  // namespace fastgen::attention
