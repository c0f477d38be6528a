// Tile sizes of the latent kernels, which are memory bound: elementwise, with a sum along each row.
//
//   threads per row   columns            registers   blocks per multiprocessor   reason
//   1 .. 32           up to 128 chunks   <= 80       3                           a row fits a warp: no block reduction
//   256               more               <= 80       3                           24 KiB and more of loads in flight
//
// A chunk is one 16-byte access: 4 float32 or 8 half-precision elements, a whole number of Philox groups.
#pragma once

#include "common/philox.h"

namespace fastgen::latent {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;

constexpr int chunk_elements(int element_size) { return kVectorBytes / element_size; }
static_assert(chunk_elements(4) % kGroup == 0 && chunk_elements(2) % kGroup == 0,
              "a chunk is a whole number of Philox groups");

// Rows of up to this many chunks per lane are processed by a warp or less, longer ones by a block.
constexpr int kWarpChunksPerLane = 4;
// A row is split among blocks until there are this many blocks per multiprocessor ...
constexpr int kBlocksPerMultiprocessor = 8;
// ... but a thread keeps at least this many chunks, to have loads in flight.
constexpr int kMinChunksPerThread = 2;

}  // namespace fastgen::latent
