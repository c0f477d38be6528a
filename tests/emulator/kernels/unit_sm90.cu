// Unit kernels, as in unit.cu, of the instructions that came with sm_90.
#include "device/barrier.cuh"
#include "device/mbarrier.cuh"
#include "device/mma.cuh"
#include "device/warp.cuh"
#include "kernels/registry.h"

namespace fastgen::kernels {
namespace {

// in: kMatrices registers a lane; out: the 32 rows of 16 bytes, of which unwritten ones hold 7s.
template <int kMatrices, bool kTransposed>
__global__ void matrix_stores(Arguments a) {
  auto* tile = reinterpret_cast<uint32_t*>(device::dynamic_shared());
  const int lane = threadIdx.x;
  for (int i = 0; i < 4; ++i) tile[4 * lane + i] = 7;
  device::sync_warp();
  uint32_t registers[kMatrices];
  for (int i = 0; i < kMatrices; ++i) registers[i] = words(a)[lane * kMatrices + i];
  if constexpr (kTransposed) {
    device::stmatrix_trans(tile + 4 * lane, registers);
  } else {
    device::stmatrix(tile + 4 * lane, registers);
  }
  device::sync_warp();
  for (int i = 0; i < 4; ++i) results(a)[4 * lane + i] = tile[4 * lane + i];
}
const Register kStore1("stmatrix x1", matrix_stores<1, false>), kStore2("stmatrix x2", matrix_stores<2, false>),
    kStore4("stmatrix x4", matrix_stores<4, false>), kStore1t("stmatrix x1 trans", matrix_stores<1, true>),
    kStore2t("stmatrix x2 trans", matrix_stores<2, true>), kStore4t("stmatrix x4 trans", matrix_stores<4, true>);

struct OneBarrier {
  device::Mbarrier barrier;
};
struct OneWord {
  uint32_t word;
};

// Three phases; in each, thread n[0] writes a word and arrives with bytes to come, which another thread completes.
__global__ void phases(Arguments a) {
  device::Mbarrier* barrier = &device::shared_variable<OneBarrier>().barrier;
  uint32_t& word = device::shared_variable<OneWord>().word;
  const int thread = threadIdx.x, writer = a.n[0];
  if (thread == 0) device::mbarrier_init(barrier, blockDim.x);
  device::sync_block();
  for (int phase = 0; phase < 3; ++phase) {
    if (thread == writer) {
      word = words(a)[phase];
      device::mbarrier_expect(barrier, 4);
      device::mbarrier_arrive_expect(barrier, 12);
      device::mbarrier_complete(barrier, 16);
    } else {
      device::mbarrier_arrive(barrier);
    }
    if (phase == 1) {
      while (!device::mbarrier_test(barrier, phase & 1)) {
      }
    } else {
      device::mbarrier_wait(barrier, phase & 1);
    }
    results(a)[phase * blockDim.x + thread] = word;
    device::sync_block();
  }
  if (thread == 0) device::mbarrier_invalidate(barrier);
}
const Register kPhases("phases", phases);

}  // namespace
}  // namespace fastgen::kernels
