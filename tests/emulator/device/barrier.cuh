// Host twin of csrc/device/barrier.cuh.
#pragma once

#include "device/language.h"

namespace fastgen::device {

__forceinline__ void sync_block(FASTGEN_WHERE) { emulator::sync_block(where); }

__forceinline__ void sync_named(int barrier, int threads, FASTGEN_WHERE) {
  emulator::sync_named(barrier, threads, where);
}

__forceinline__ void arrive_named(int barrier, int threads, FASTGEN_WHERE) {
  emulator::arrive_named(barrier, threads, where);
}

}  // namespace fastgen::device
