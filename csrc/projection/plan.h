// Launch plans: how tiles, splits and heads are distributed over blocks. Host code, exposed by fastgen.backend.plans.
#pragma once

#include <cstdint>

#include "projection/params.h"
#include "projection/tiles.h"

namespace fastgen::projection {

struct Plan {
  int tile;                         // index of kTileShapes
  int64_t row_tiles, column_tiles;  // over the whole batch
  int splits;
};

constexpr int64_t column_tiles(const Band* bands, int count) {
  int64_t tiles = 0;
  for (int i = 0; i < count; ++i) tiles += ceil_div(bands[i].columns, bands[i].per_tile);
  return tiles;
}

// The largest tile that gives every multiprocessor a block, or the smallest that holds a head of ``widest`` columns.
constexpr Plan project_plan(const Tokens& tokens, int columns, int widest, int multiprocessors) {
  Plan plan = {};
  for (int tile = kTileCount - 1; tile >= 0; --tile) {
    plan = {tile, tokens.batch * ceil_div(tokens.count, kTileShapes[tile].block_m),
            ceil_div(columns, kTileShapes[tile].block_n), 1};
    if (plan.row_tiles * plan.column_tiles >= multiprocessors) break;
    if (tile > 0 && kTileShapes[tile - 1].block_n < widest) break;
  }
  return plan;
}

// Split-K over tokens, until there are two blocks per multiprocessor; a split has at least kMinTiles tiles of BLOCK_K.
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kMinTiles = 8;

constexpr int64_t gradient_tiles(const Tokens& tokens, int element_size) {
  return tokens.batch * ceil_div(tokens.count, block_k(element_size));
}

constexpr Plan gradient_plan(const Tokens& tokens, int rows, int columns, int element_size, int multiprocessors) {
  const int64_t blocks = int64_t{kBlocksPerMultiprocessor} * multiprocessors;
  const int64_t most = ceil_div(gradient_tiles(tokens, element_size), kMinTiles);
  Plan plan = {};
  for (int tile = kTileCount - 1; tile >= 0; --tile) {
    plan = {tile, ceil_div(rows, kTileShapes[tile].block_m), ceil_div(columns, kTileShapes[tile].block_n), 1};
    const int64_t tiles = plan.row_tiles * plan.column_tiles;
    const int64_t wanted = tiles > 0 ? blocks / tiles : 1;
    const int64_t splits = wanted < most ? wanted : most;
    plan.splits = static_cast<int>(splits < 1 ? 1 : splits);
    if (tiles * plan.splits >= multiprocessors) break;
  }
  return plan;
}

// With QK-norm or RoPE tiles hold whole heads: one band per part. Otherwise one band for all columns.
constexpr int make_bands(Band (&bands)[kMostParts], const Matrix& out, bool whole_heads, int tile) {
  const int widest = kTileShapes[tile].block_n;
  if (!whole_heads) {
    bands[0] = {0, out.channels, widest};
    return 1;
  }
  for (int i = 0; i < out.count; ++i) {
    const int end = i + 1 < out.count ? out.parts[i + 1].first : out.channels, dim = out.parts[i].dim;
    bands[i] = {out.parts[i].first, end - out.parts[i].first, dim > widest ? widest : widest / dim * dim};
  }
  return out.count;
}

// Backward of QK-norm and RoPE: a warp per head, a grid-stride loop over heads.
constexpr int kHeadBlocksPerMultiprocessor = 4;
constexpr int64_t head_blocks(int64_t heads, int multiprocessors) {
  const int64_t most = int64_t{kHeadBlocksPerMultiprocessor} * multiprocessors;
  const int64_t wanted = ceil_div(heads, kHeadThreads / 32);
  return wanted < most ? wanted : most;
}

}  // namespace fastgen::projection
