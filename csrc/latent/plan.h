// Launch plan: threads per row, rows per block, and splits of a row. Host code, exposed by fastgen.backend.plans.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "latent/tiles.h"

namespace fastgen::latent {

struct Plan {
  int threads_per_row;  // a power of two up to 32, or kThreads
  int rows_per_block;
  int64_t row_blocks;  // gridDim.x
  int splits;          // gridDim.y: blocks per row
};

constexpr Plan make_plan(int64_t rows, int64_t cols, int element_size, int multiprocessors) {
  const int64_t chunks = ceil_div(cols, chunk_elements(element_size));
  int team = 1;
  while (team < 32 && team < chunks) team *= 2;
  if (chunks > int64_t{32} * kWarpChunksPerLane) team = kThreads;
  const int rows_per_block = kThreads / team;
  const int64_t row_blocks = ceil_div(rows, rows_per_block);
  int64_t splits = 1;
  if (team == kThreads && row_blocks > 0) {
    const int64_t wanted = ceil_div(int64_t{multiprocessors} * kBlocksPerMultiprocessor, row_blocks);
    const int64_t most = ceil_div(chunks, int64_t{kThreads} * kMinChunksPerThread);
    splits = wanted < most ? wanted : most;
  }
  return {team, rows_per_block, row_blocks, static_cast<int>(splits < 1 ? 1 : splits)};
}

}  // namespace fastgen::latent
