// The main loop of every attention kernel: tiles in shared memory, copied with cp.async one ahead of the tile in use.
//
//   2 stages   wait  sync  copy tile i + 1   body of tile i                        copies overlap with the body
//   1 stage    wait  sync                    body of tile i   sync  copy tile i + 1
//
// The first sync makes every thread's copies of tile i visible to the block and, with 2 stages, guarantees that all
// warps have left the stage that the next copy overwrites. The second one guarantees that with a single stage.
#pragma once

#include "device/barrier.cuh"
#include "device/copy.cuh"

namespace fastgen::attention {

// One iteration. copy_next() starts the copies of the next tile, if there is one; body() uses the current tile. Called
// by the whole block.
template <int kStages, typename CopyNext, typename Body>
__device__ __forceinline__ void pipeline_step(CopyNext&& copy_next, Body&& body) {
  static_assert(kStages == 1 || kStages == 2, "one tile ahead, at most");
  device::async_copy_wait<0>();
  device::sync_block();
  if constexpr (kStages == 2) {
    copy_next();
    device::async_copy_commit();
  }
  body();
  if constexpr (kStages == 1) {
    device::sync_block();
    copy_next();
    device::async_copy_commit();
  }
}

// Iterates over tiles from ``tile`` on, whose copy has been started: copy(tile, i) and body(tile, i) with i the number
// of the tile, which selects its stage.
template <int kStages, typename Tiles, typename Copy, typename Body>
__device__ __forceinline__ void pipeline(const Tiles& tiles, typename Tiles::Index tile, Copy&& copy, Body&& body) {
  bool more = tiles.has_first();
  for (int i = 0; more; ++i) {
    const typename Tiles::Index current = tile;
    tile = tiles.next(current);
    more = tiles.contains(tile);
    pipeline_step<kStages>(
        [&] {
          if (more) copy(tile, i + 1);
        },
        [&] { body(current, i); });
  }
}

}  // namespace fastgen::attention
