// Host twin of csrc/device/copy.cuh.
#pragma once

#include "device/mbarrier.cuh"
#include "device/shared.cuh"

namespace fastgen::device {

template <int kBytes>
__forceinline__ void async_copy(void* target, const void* source, int valid = kBytes, FASTGEN_WHERE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  emulator::async_copy(target, source, kBytes, valid, where);
}

__forceinline__ void async_copy_commit(FASTGEN_WHERE) { emulator::async_copy_commit(where); }

template <int kGroups>
__forceinline__ void async_copy_wait(FASTGEN_WHERE) {
  emulator::async_copy_wait(kGroups, where);
}

__forceinline__ void async_copy_wait_all(FASTGEN_WHERE) { emulator::async_copy_wait(-1, where); }

__forceinline__ void async_copy_arrive(Mbarrier* barrier, FASTGEN_WHERE) {
  emulator::async_copy_arrive(barrier, where);
}

}  // namespace fastgen::device
