// Host twin of csrc/device/warp.cuh.
#pragma once

#include "device/threads.h"

namespace fastgen::device {

inline float shuffle_xor(float value, int mask) {
  Block& block = *current_block;
  const int thread = threadIdx.x, warp = thread / kWarpSize;
  block.slots[thread] = value;
  block.warps[warp]->arrive_and_wait();
  const float received = block.slots[warp * kWarpSize + ((thread % kWarpSize) ^ mask)];
  block.warps[warp]->arrive_and_wait();
  return received;
}

inline void sync_block() { current_block->everyone.arrive_and_wait(); }

}  // namespace fastgen::device
