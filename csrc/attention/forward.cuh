// Forward pass, in one pass over the keys and O(N) memory (Dao, "FlashAttention-2", 2023):
//
//   for each query tile of the block                       load Q
//     for each visible key tile                            load K, V    one tile ahead, see pipeline.cuh
//       S = scale * Q K^T + mask                           scores       soft-capped before the mask: softcap.cuh
//       m' = max(m, rowmax S), P = 2^(S - m'),             softmax      online; m, l in registers
//       l = l 2^(m - m') + rowsum P, O = O 2^(m - m')
//       O += dropout(P) V                                  accumulate
//     out = O / l, lse = m + log l                         epilogue
//
//                     keys, BLOCK_N at a time ->
//                   +---------+---------+---
//   block: BLOCK_M  | warp 0: 16 * fragments queries       P stays in the registers that S was computed in: the
//   queries of one  | warp 1                               accumulators of S are the left operand of P V
//   head            | ...
//                   +---------+---------+---
//
// gridDim = (query tiles of all heads / tiles_per_block, slices of the value dim).
#pragma once

#include "attention/dropout.cuh"
#include "attention/pipeline.cuh"
#include "attention/scheduler.cuh"
#include "attention/softcap.cuh"
#include "attention/softmax.cuh"
#include "attention/store.cuh"
#include "device/shared.cuh"

namespace fastgen::attention {

// Shared memory: query_buffers query tiles, then the stages of (K, V).
template <typename T, int kKeyDim, int kValueDim, bool kPlain>
struct ForwardLayout {
  static constexpr Dims kDims = {kKeyDim, kValueDim};
  static constexpr TileShape kShape = forward_shape(kDims, sizeof(T), kPlain);
  static constexpr int BLOCK_N = kShape.iterated;
  static constexpr int kThreads = 32 * kShape.warps, kWarpRows = kShape.fragments * kFragmentRows;
  static constexpr int kColumns = smaller(kValueDim, kShape.columns);
  static constexpr bool kTwoBuffers = query_buffers(kDims, sizeof(T), kPlain) == 2;  // at most
  using Query = Tile<T, kKeyDim>;
  using Key = Tile<T, kKeyDim>;
  using Value = Tile<T, kColumns>;
  static constexpr int kKeyBytes = BLOCK_N * row_bytes(kKeyDim, sizeof(T));
  static constexpr int kStageBytes = kKeyBytes + BLOCK_N * row_bytes(kColumns, sizeof(T));

  static __device__ __forceinline__ int block_m() { return static_cast<int>(blockDim.x / 32) * kWarpRows; }
  // i: the number of the query tile, or of the key tile, in the order of their copies.
  static __device__ __forceinline__ Query query(const ForwardParams& p, int i) {
    const int bytes = block_m() * row_bytes(kKeyDim, sizeof(T)), buffer = kTwoBuffers ? i & (p.query_buffers - 1) : 0;
    return {reinterpret_cast<T*>(device::dynamic_shared() + buffer * bytes)};
  }
  static __device__ __forceinline__ unsigned char* stage(const ForwardParams& p, int i) {
    const int queries = (kTwoBuffers ? p.query_buffers : 1) * block_m() * row_bytes(kKeyDim, sizeof(T));
    return device::dynamic_shared() + queries + (i & (p.stages - 1)) * kStageBytes;
  }
  static __device__ __forceinline__ Key key(const ForwardParams& p, int i) {
    return {reinterpret_cast<T*>(stage(p, i))};
  }
  static __device__ __forceinline__ Value value(const ForwardParams& p, int i) {
    return {reinterpret_cast<T*>(stage(p, i) + kKeyBytes)};
  }
};

// kPlain: no mask, dropout, softcap or packed sequences.
template <typename T, int kKeyDim, int kValueDim, bool kPlain>
__global__ void __launch_bounds__(ForwardLayout<T, kKeyDim, kValueDim, kPlain>::kThreads, 1)
    attention_forward(ForwardParams p) {
  using Layout = ForwardLayout<T, kKeyDim, kValueDim, kPlain>;
  constexpr TileShape kShape = Layout::kShape;
  constexpr int BLOCK_N = Layout::BLOCK_N;
  constexpr int kFragments = kShape.fragments, kTiles = BLOCK_N / 8, kColumns = Layout::kColumns;
  using Tiles = KeyTiles<T, BLOCK_N, kPlain>;
  const Problem& problem = p.problem;
  const int block_m = Layout::block_m(), warp_row = uniform_warp() * Layout::kWarpRows;
  const int first_column = static_cast<int>(blockIdx.y) * kColumns;
  constexpr MayPack<!kPlain> may_pack;

  const auto load_queries = [&](const QueryBlock& block, int i) {
    copy_rows(Layout::query(p, i), block_m, row_pointer<T>(p.query, block.batch, block.head, block.queries.begin),
              p.query.row, problem.key_dim, [&](int row) { return row < block.rows(); });
  };
  using Keys = TileSource<T, kKeyDim, BLOCK_N, kShape.warps>;
  using Values = TileSource<T, kColumns, BLOCK_N, kShape.warps>;
  const auto keys_of = [&](const QueryBlock& block) {
    return Keys(row_pointer<T>(p.key, block.key_batch, block.key_head, 0), p.key.row, problem.key_dim);
  };
  const auto values_of = [&](const QueryBlock& block) {
    return Values(row_pointer<T>(p.value, block.key_batch, block.key_head, 0) + first_column, p.value.row,
                  problem.value_dim - first_column);
  };
  const auto load_keys = [&](const Keys& keys, const Values& values, const typename Tiles::Index& tile, int i) {
    const auto is_live = [&](int row) { return tile.is_live(row); };
    const auto key = static_cast<unsigned>(tile.key());
    keys.copy(Layout::key(p, i), key * p.key.row, tile.all_live(), is_live);
    values.copy(Layout::value(p, i), key * p.value.row, tile.all_live(), is_live);
  };

  const unsigned first_tile = blockIdx.x * (Layout::kTwoBuffers ? static_cast<unsigned>(p.tiles_per_block) : 1u);
  unsigned query_tiles = 1;
  if constexpr (Layout::kTwoBuffers) {
    const unsigned heads = static_cast<unsigned>(problem.batch) * static_cast<unsigned>(problem.heads);
    const unsigned all = tiles_of_head_32(problem.queries, block_m, kPlain ? 0 : problem.sequences.count) * heads;
    const unsigned left = all - first_tile, most = static_cast<unsigned>(p.tiles_per_block);
    query_tiles = left < most ? left : most;
  }
  typename Tiles::Index tile;
  // The queries of a tile and its first keys, which are the i-th key tile of this block.
  const auto load = [&](unsigned query_tile, int i) {
    const QueryBlock block(problem, first_tile + query_tile, block_m, may_pack);
    tile = Tiles(problem, block).first();
    load_queries(block, query_tile);
    load_keys(keys_of(block), values_of(block), tile, i);
  };
  if constexpr (!kPlain) {
    if (problem.sequences.count > 0 && QueryBlock(problem, first_tile, block_m, may_pack).rows() <= 0) return;
  }
  load(0, 0);
  device::async_copy_commit();

  int i = 0;  // key tiles, counted through all query tiles
  for (unsigned query_tile = 0; query_tile < query_tiles; ++query_tile) {
    const QueryBlock block(problem, first_tile + query_tile, block_m, may_pack);
    const Tiles tiles(problem, block);
    const Keys keys = keys_of(block);
    const Values values = values_of(block);
    const int row = block.queries.begin + warp_row, warp_rows = block.rows() - warp_row;
    const Band window = Band::of<false>(problem, row);
    Softmax softmax[kFragments];
    float out[kFragments][kColumns / 8][4] = {};

    const auto apply_softmax = [&](float (&scores)[kFragments][kTiles][4], float factor, int key) {
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
        float rescale[2];
        softmax[m].update(scores[m], factor, rescale);
        // The factors are 1 once the row's maximum has been found. A wide output has no registers for the test.
        constexpr bool kAlways = kFragments * kColumns > 128;
        if (kAlways || device::any_lane(rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
          for (auto& sums : out[m]) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[e] *= rescale[e / 2];
          }
        }
      }
      if constexpr (!kPlain) {
        if (problem.dropout.seeds != nullptr) {
          HeadDropout(problem, block.first_row).template kept<kFragments, kTiles>(row, key).apply(scores);
        }
      }
    };

    const auto attend = [&](const typename Tiles::Index& current) {
      const int key = current.key();
      const Band band = window.from(key);
      if (warp_rows <= 0 || band.misses(Layout::kWarpRows, BLOCK_N)) return;
      const bool masked = tiles.is_masked(current, band, Layout::kWarpRows);
      Visible<kFragments, kTiles> visible;
      const auto find_visible = [&] {
        visible =
            visible_scores<kPlain, false, kFragments, kTiles>(band, tiles.mask, row, warp_rows, key, current.live);
      };
      if (!kPlain && masked) {
        find_visible();
        if (!device::any_lane(visible.any())) return;
      }
      float scores[kFragments][kTiles][4] = {};
      multiply_rows(scores, Layout::query(p, query_tile), warp_row, Layout::key(p, i), problem.exact);
      if (kPlain && masked) find_visible();
      const float scale = cap_scores<kPlain>(scores, problem);
      const float factor = mask_scores<kPlain, false>(scores, scale, masked, visible, tiles.mask, row, key);
      apply_softmax(scores, factor, key);
      const uint32_t live = kPlain || !masked ? 0 : visible.columns(current.live);
      multiply_weights<T, (kColumns > 128)>(out, scores, Layout::value(p, i), 0, problem.exact, !kPlain && masked,
                                            live);
    };

    bool more = true;
    while (more) {
      const typename Tiles::Index current = tile;
      tile = tiles.next(current);
      more = tiles.contains(tile);
      pipeline_step(
          p.stages, i,
          [&](bool ahead) {
            if (more || !ahead) {
              typename Tiles::Index copied = current;
              if (ahead) copied = tile;
              load_keys(keys, values, copied, ahead ? i + 1 : i);
            } else if (query_tile + 1 < query_tiles) {
              load(query_tile + 1, i + 1);
            }
          },
          [&] { attend(current); });
      ++i;
    }

    const auto epilogue = [&] {
      float inverse[kFragments][2];
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
        softmax[m].finalize();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          inverse[m][half] = softmax[m].inverse(half);
          const int down = m * kFragmentRows + half * 8 + lane_row();
          if (down < warp_rows && lane_column() == 0 && blockIdx.y == 0) {
            *row_pointer(p.lse, block.batch, block.head, row + down) = softmax[m].lse(half);
          }
        }
      }
      store_rows(row_pointer<T>(p.out, block.batch, block.head, row) + first_column, p.out.row, warp_rows,
                 problem.value_dim - first_column, inverse, out);
    };
    epilogue();
  }
}

}  // namespace fastgen::attention
