// The schedule: tiles, and how a projection is shared out among blocks. Host code, shown by fastgen._C.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>

#include "common/tiling.h"
#include "projection/params.h"

namespace fastgen::projection {

// A block's tile of the output, and how its warps share it.
struct Shape {
  int rows, columns, warps_down, warps_across;

  FASTGEN_HOST_DEVICE constexpr int threads() const { return 32 * warps_down * warps_across; }
};

constexpr Shape kShapes[] = {{64, 64, 2, 2}, {128, 128, 2, 4}};
constexpr int kShapeCount = static_cast<int>(std::size(kShapes));
constexpr int kWidestHead = kShapes[kShapeCount - 1].columns;  // that can be normalised or turned: a tile has it whole

// Blocks that a multiprocessor has registers for, at least.
FASTGEN_HOST_DEVICE constexpr int resident_blocks(int shape, int element_size) {
  return shape == 0 ? 4 : element_size == 2 ? 2 : 1;
}

constexpr int kStages = 3;       // steps in shared memory, one of them worked on
constexpr int kDepthBytes = 64;  // of an operand's row, where the summed index is across

FASTGEN_HOST_DEVICE constexpr int depth(int element_size) { return kDepthBytes / element_size; }

// Down: the summed index goes down the tile's rows.
FASTGEN_HOST_DEVICE constexpr int operand_bytes(int extent, int element_size, bool down) {
  return down ? depth(element_size) * row_bytes(extent, element_size)
              : extent * row_bytes(depth(element_size), element_size);
}
constexpr int pipeline_bytes(const Shape& shape, int element_size, bool left_down, bool right_down) {
  return kStages *
         (operand_bytes(shape.rows, element_size, left_down) + operand_bytes(shape.columns, element_size, right_down));
}

// Between the products and the output a tile lies in shared memory in float32, tokens or channels down. With these
// paddings the fragments of a warp go to different banks.
constexpr int kPaddedColumns = 8, kPaddedRows = 4;
constexpr int staging_bytes(const Shape& shape) {
  const int wide = shape.rows * (shape.columns + kPaddedColumns), high = shape.columns * (shape.rows + kPaddedRows);
  return 4 * larger(wide, high);
}

constexpr bool all_fit() {
  for (const Shape& shape : kShapes) {
    for (const int size : {2, 4}) {
      for (const bool left : {false, true}) {
        for (const bool right : {false, true}) {
          if (pipeline_bytes(shape, size, left, right) > kSharedLimit) return false;
        }
      }
    }
    if (staging_bytes(shape) > kSharedLimit) return false;
  }
  return true;
}
static_assert(all_fit(), "every tile runs on every GPU from sm_80 on");

struct Plan {
  int shape;                        // index of kShapes
  int64_t row_tiles, column_tiles;  // of all entries of the batch
  int splits;
};

constexpr int64_t column_tiles(const Band* bands, int count) {
  int64_t tiles = 0;
  for (int i = 0; i < count; ++i) tiles += ceil_div(bands[i].columns, bands[i].per_tile);
  return tiles;
}

// Large tiles where they make a block for each multiprocessor, or where a head of ``widest`` columns has to fit.
constexpr Plan project_plan(const Tokens& tokens, int columns, int widest, int multiprocessors) {
  Plan plan = {};
  for (int shape = kShapeCount - 1; shape >= 0; --shape) {
    plan = {shape, tokens.batch * ceil_div(tokens.count, kShapes[shape].rows),
            ceil_div(columns, kShapes[shape].columns), 1};
    if (plan.row_tiles * plan.column_tiles >= multiprocessors) break;
    if (shape > 0 && kShapes[shape - 1].columns < widest) break;
  }
  return plan;
}

// The sums over tokens are split until there are two blocks for each multiprocessor; but a split has some steps.
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kLeastSteps = 8;

constexpr int64_t gradient_steps(const Tokens& tokens, int element_size) {
  return tokens.batch * ceil_div(tokens.count, depth(element_size));
}

constexpr Plan gradient_plan(const Tokens& tokens, int rows, int columns, int element_size, int multiprocessors) {
  const int64_t blocks = int64_t{kBlocksPerMultiprocessor} * multiprocessors;
  const int64_t most = ceil_div(gradient_steps(tokens, element_size), kLeastSteps);
  Plan plan = {};
  for (int shape = kShapeCount - 1; shape >= 0; --shape) {
    plan = {shape, ceil_div(rows, kShapes[shape].rows), ceil_div(columns, kShapes[shape].columns), 1};
    const int64_t tiles = plan.row_tiles * plan.column_tiles;
    const int64_t wanted = tiles > 0 ? blocks / tiles : 1;
    const int64_t splits = wanted < most ? wanted : most;
    plan.splits = static_cast<int>(splits < 1 ? 1 : splits);
    if (tiles * plan.splits >= multiprocessors) break;
  }
  return plan;
}

// Whole heads, where they are normalised or turned: a band for each part. Otherwise one for all columns.
constexpr int make_bands(Band (&bands)[kMostParts], const Matrix& out, bool whole_heads, int shape) {
  const int widest = kShapes[shape].columns;
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

// Gradients of normalised and turned heads: a warp for each, blocks that each go over many.
constexpr int kHeadThreads = 256;
constexpr int kHeadBlocksPerMultiprocessor = 4;
constexpr int64_t head_blocks(int64_t heads, int multiprocessors) {
  const int64_t most = int64_t{kHeadBlocksPerMultiprocessor} * multiprocessors;
  const int64_t wanted = ceil_div(heads, kHeadThreads / 32);
  return wanted < most ? wanted : most;
}

constexpr int kSumThreads = 256;

}  // namespace fastgen::projection
