// The main loop of every attention kernel: tiles in shared memory, copied with cp.async.
//
//   2 stages   wait  sync  copy tile i + 1               body of tile i   copies overlap with the body
//   1 stage    wait  sync  copy tile i      wait  sync   body of tile i   copies overlap with other blocks
//
// The first wait and sync make every thread's copies of tile i visible to the block, of the first tile if there is one
// stage; that sync also guarantees that all warps have left the stage that the copy overwrites. With one stage the
// second wait and sync make the others visible. The copy of the first tile is started before the loop.
//
// The number of stages is a template argument, or chosen by the launch plan: tiles.h.
#pragma once

#include "device/barrier.cuh"
#include "device/copy.cuh"

namespace fastgen::attention {

// One iteration, of tile i. ``stages``: 1 or 2. copy(true) starts the copies of the next tile, if there is one,
// copy(false) those of the current one; body() uses the current one. Called by the whole block.
template <typename Copy, typename Body>
__device__ __forceinline__ void pipeline_step(int stages, int i, Copy&& copy, Body&& body) {
  const bool ahead = stages == 2;
  device::async_copy_wait<0>();
  device::sync_block();
  if (ahead || i > 0) copy(ahead);
  device::async_copy_commit();
  if (!ahead && i > 0) {
    device::async_copy_wait<0>();
    device::sync_block();
  }
  body();
}

// Iterates over tiles from ``tile`` on, whose copy has been started: copy(tile, stage) and body(tile, stage).
template <typename Tiles, typename Copy, typename Body>
__device__ __forceinline__ void pipeline(int stages, const Tiles& tiles, typename Tiles::Index tile, Copy&& copy,
                                         Body&& body) {
  bool more = tiles.has_first();
  for (int i = 0; more; ++i) {
    const typename Tiles::Index current = tile;
    tile = tiles.next(current);
    more = tiles.contains(tile);
    const int stage = i & (stages - 1);
    pipeline_step(
        stages, i,
        [&](bool ahead) {
          typename Tiles::Index copied = current;  // a conditional operator would choose an address, in local memory
          if (ahead) copied = tile;
          if (more || !ahead) copy(copied, ahead ? stage ^ 1 : stage);
        },
        [&] { body(current, stage); });
  }
}
template <int kStages, typename Tiles, typename Copy, typename Body>
__device__ __forceinline__ void pipeline(const Tiles& tiles, typename Tiles::Index tile, Copy&& copy, Body&& body) {
  static_assert(kStages == 1 || kStages == 2, "one tile ahead, at most");
  pipeline(kStages, tiles, tile, copy, body);
}

}  // namespace fastgen::attention
