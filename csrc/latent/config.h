// How rows are shared out among threads: the one place that chooses. Host code, shown by fastgen._C.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "common/types.h"

namespace fastgen::latent {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;

// A thread works on chunks of one 16-byte access, a whole number of Philox groups.
constexpr int chunk_elements(int element_size) { return kVectorBytes / element_size; }
static_assert(chunk_elements(4) % kGroup == 0 && chunk_elements(2) % kGroup == 0, "a chunk is whole groups");

// A warp or less takes rows of up to this many chunks a lane; longer rows take a block.
constexpr int kWarpChunksPerLane = 4;
// A row is split among blocks until the device has this many blocks for each multiprocessor ...
constexpr int kBlocksPerMultiprocessor = 8;
// ... but a thread keeps at least this many chunks, to have loads in flight.
constexpr int kMinChunksPerThread = 2;

struct Plan {
  int threads_per_row;  // a power of two up to 32, or kThreads
  int rows_per_block;
  int64_t row_blocks;  // gridDim.x
  int splits;          // gridDim.y: blocks that share a row
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
