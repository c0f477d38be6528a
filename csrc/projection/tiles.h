// Tile table of the projection GEMMs. Host code; the launch plan is in plan.h.
//
//                  BLOCK_N columns
//              +---------+---------+
//   BLOCK_M    | warp 0  | warp 1  |   warps_m x warps_n warps; each accumulates its part in registers
//   rows       +---------+---------+
//              | warp 2  | warp 3  |   BLOCK_K of the summed index per stage, kStages stages of cp.async
//              +---------+---------+
#pragma once

#include <cstddef>
#include <initializer_list>

#include "common/tiling.h"

namespace fastgen::projection {

struct TileShape {
  int block_m, block_n, warps_m, warps_n;

  FASTGEN_HOST_DEVICE constexpr int threads() const { return 32 * warps_m * warps_n; }
};

// clang-format off
//                                    BLOCK_M BLOCK_N warps   registers, blocks per multiprocessor: reason
constexpr TileShape kTileShapes[] = {{64,     64,     2, 2},  // <= 128, 4: small problems, which need many blocks
                                     {128,    128,    2, 4}}; // <= 128, 2; float32 <= 192, 1: fewer copies
// clang-format on
constexpr int kTileCount = length(kTileShapes);
// The largest head dim with QK-norm or RoPE, which need whole heads in a tile.
constexpr int kLargestHead = kTileShapes[kTileCount - 1].block_n;

// Minimum blocks per multiprocessor, for __launch_bounds__.
FASTGEN_HOST_DEVICE constexpr int resident_blocks(int tile, int element_size) {
  return tile == 0 ? 4 : element_size == 2 ? 2 : 1;
}

constexpr int kStages = 3;        // in shared memory, one of them in use
constexpr int kBlockKBytes = 64;  // bytes of BLOCK_K elements

FASTGEN_HOST_DEVICE constexpr int block_k(int element_size) { return kBlockKBytes / element_size; }

// k_rows: the summed index k runs down the rows of the tile (MN-major operand); otherwise along them (K-major).
FASTGEN_HOST_DEVICE constexpr int operand_bytes(int extent, int element_size, bool k_rows) {
  return k_rows ? block_k(element_size) * row_bytes(extent, element_size)
                : extent * row_bytes(block_k(element_size), element_size);
}
constexpr int pipeline_bytes(const TileShape& tile, int element_size, bool left_k_rows, bool right_k_rows) {
  return kStages * (operand_bytes(tile.block_m, element_size, left_k_rows) +
                    operand_bytes(tile.block_n, element_size, right_k_rows));
}

// The epilogue stages the accumulators in shared memory in float32, tokens or channels along the rows. The padding
// avoids bank conflicts of a warp's fragments.
constexpr int kPaddedColumns = 8, kPaddedRows = 4;
constexpr int staging_bytes(const TileShape& tile) {
  const int channels_last = tile.block_m * (tile.block_n + kPaddedColumns);
  const int channels_first = tile.block_n * (tile.block_m + kPaddedRows);
  return 4 * larger(channels_last, channels_first);
}

constexpr bool all_fit() {
  for (const TileShape& tile : kTileShapes) {
    for (const int size : {2, 4}) {
      for (const bool left : {false, true}) {
        for (const bool right : {false, true}) {
          if (pipeline_bytes(tile, size, left, right) > kSharedLimit) return false;
        }
      }
    }
    if (staging_bytes(tile) > kSharedLimit) return false;
  }
  return true;
}
static_assert(all_fit(), "the shared memory of every tile fits every GPU from sm_80 on");

// Backward of QK-norm and RoPE, and reductions: threads per block.
constexpr int kHeadThreads = 256;
constexpr int kSumThreads = 256;

}  // namespace fastgen::projection
