// Host twin of csrc/device/mbarrier.cuh.
#pragma once

#include "device/shared.cuh"

namespace fastgen::device {

struct alignas(8) Mbarrier {
  uint64_t opaque;
};

__forceinline__ void mbarrier_init(Mbarrier* barrier, int arrivals, FASTGEN_WHERE) {
  emulator::mbarrier_init(barrier, arrivals, where);
}
__forceinline__ void mbarrier_invalidate(Mbarrier* barrier, FASTGEN_WHERE) {
  emulator::mbarrier_invalidate(barrier, where);
}
__forceinline__ void mbarrier_arrive(Mbarrier* barrier, FASTGEN_WHERE) { emulator::mbarrier_arrive(barrier, 0, where); }
__forceinline__ void mbarrier_arrive_expect(Mbarrier* barrier, int bytes, FASTGEN_WHERE) {
  emulator::mbarrier_arrive(barrier, bytes, where);
}
__forceinline__ void mbarrier_expect(Mbarrier* barrier, int bytes, FASTGEN_WHERE) {
  emulator::mbarrier_expect(barrier, bytes, where);
}
__forceinline__ void mbarrier_complete(Mbarrier* barrier, int bytes, FASTGEN_WHERE) {
  emulator::mbarrier_complete(barrier, bytes, where);
}
__forceinline__ bool mbarrier_test(const Mbarrier* barrier, int parity, FASTGEN_WHERE) {
  return emulator::mbarrier_test(barrier, parity, where);
}
__forceinline__ void mbarrier_wait(const Mbarrier* barrier, int parity, FASTGEN_WHERE) {
  emulator::mbarrier_wait(barrier, parity, where);
}

}  // namespace fastgen::device
