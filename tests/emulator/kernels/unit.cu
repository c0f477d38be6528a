// One kernel for each function of the device layer: inputs from global memory, the results of every lane to global
// memory.
#include "device/atomic.cuh"
#include "device/barrier.cuh"
#include "device/bits.cuh"
#include "device/copy.cuh"
#include "device/math.cuh"
#include "device/mbarrier.cuh"
#include "device/mma.cuh"
#include "device/vector.cuh"
#include "device/warp.cuh"
#include "kernels/registry.h"

namespace fastgen::kernels {
namespace {

// n[0]: operand, n[1]: mask. Lanes outside the mask write their own value.
template <int kMode>
__global__ void shuffles(Arguments a) {
  const int lane = threadIdx.x;
  const unsigned mask = static_cast<unsigned>(a.n[1]);
  uint32_t value = words(a)[lane];
  if ((mask >> lane & 1) != 0) {
    if constexpr (kMode == 0) value = device::shuffle_xor(value, a.n[0], mask);
    if constexpr (kMode == 1) value = device::shuffle_up(value, a.n[0], mask);
    if constexpr (kMode == 2) value = device::shuffle_down(value, a.n[0], mask);
    if constexpr (kMode == 3) value = device::shuffle(value, a.n[0], mask);
  }
  results(a)[lane] = value;
}
const Register kXor("shuffle_xor", shuffles<0>), kUp("shuffle_up", shuffles<1>), kDown("shuffle_down", shuffles<2>),
    kIndex("shuffle", shuffles<3>);

__global__ void votes(Arguments a) {
  const bool predicate = words(a)[threadIdx.x] != 0;
  uint32_t* out = results(a) + 3 * threadIdx.x;
  out[0] = device::ballot(predicate);
  out[1] = device::any_lane(predicate);
  out[2] = device::all_lanes(predicate);
}
const Register kVotes("votes", votes);

// float32 -> half, bfloat16, their pairs with the negative, tf32, 2^x
__global__ void conversions(Arguments a) {
  const float value = bits_to_float(words(a)[threadIdx.x]);
  uint32_t* out = results(a) + 6 * threadIdx.x;
  out[0] = device::from_float<Half>(value).bits;
  out[1] = device::from_float<BFloat16>(value).bits;
  out[2] = device::pack<Half>(value, -value);
  out[3] = device::pack<BFloat16>(value, -value);
  out[4] = device::to_tf32(value);
  out[5] = float_to_bits(device::exp2_approx(value));
}
const Register kConversions("conversions", conversions);

__global__ void widenings(Arguments a) {
  const auto bits = static_cast<uint16_t>(words(a)[threadIdx.x]);
  results(a)[2 * threadIdx.x] = float_to_bits(device::to_float(Half{bits}));
  results(a)[2 * threadIdx.x + 1] = float_to_bits(device::to_float(BFloat16{bits}));
}
const Register kWidenings("widenings", widenings);

// Distances of 0 ... 63 and near 2^32.
__global__ void shifts(Arguments a) {
  const uint32_t word = words(a)[threadIdx.x], bits = threadIdx.x < 64 ? threadIdx.x : 64 - threadIdx.x;
  results(a)[2 * threadIdx.x] = device::shift_left(device::opaque(word), bits);
  results(a)[2 * threadIdx.x + 1] = device::shift_right(word, bits);
}
const Register kShifts("shifts", shifts);

// Every thread moves four words, through shared memory.
__global__ void vectors(Arguments a) {
  auto* tile = reinterpret_cast<uint32_t*>(device::dynamic_shared());
  const int at = 4 * threadIdx.x;
  uint32_t moved[4];
  device::load_vector(words(a) + at, moved);
  device::store_vector(tile + at, moved);
  device::sync_block();
  const int from = 4 * (blockDim.x - 1 - threadIdx.x);
  uint32_t low[2], high[2];
  device::load_words(tile + from, low), device::load_words(tile + from + 2, high);
  device::store_words(results(a) + at, low), device::store_words(results(a) + at + 2, high);
}
const Register kVectors("vectors", vectors);

// out: sum of floats, sum, largest, smallest of ints, count of exchanges that returned 0
__global__ void atomics(Arguments a) {
  const int value = static_cast<int>(words(a)[threadIdx.x]);
  auto* out = static_cast<int*>(a.out);
  device::atomic_add(static_cast<float*>(a.out), static_cast<float>(value));
  device::atomic_add(out + 1, value);
  device::atomic_max(out + 2, value);
  device::atomic_min(out + 3, value);
  if (device::atomic_exchange(out + 4, 1) == 0) device::atomic_add(out + 5, 1);
  if (device::atomic_compare_exchange(out + 6, 0, value) == 0) device::atomic_add(out + 7, 1);
}
const Register kAtomics("atomics", atomics);

// n[0]: stride of rows in bytes. in: shared memory; out: kMatrices registers a lane.
template <int kMatrices, bool kTransposed>
__global__ void matrix_loads(Arguments a) {
  unsigned char* tile = device::dynamic_shared();
  const int lane = threadIdx.x, row_words = a.n[0] / 4;
  for (int i = lane; i < 32 * row_words; i += 32) reinterpret_cast<uint32_t*>(tile)[i] = words(a)[i];
  device::sync_warp();
  device::hold_loads();
  uint32_t registers[kMatrices];
  if constexpr (kTransposed) {
    device::ldmatrix_trans(registers, tile + lane * a.n[0]);
  } else {
    device::ldmatrix(registers, tile + lane * a.n[0]);
  }
  for (int i = 0; i < kMatrices; ++i) results(a)[lane * kMatrices + i] = registers[i];
}
const Register kLoad1("ldmatrix x1", matrix_loads<1, false>), kLoad2("ldmatrix x2", matrix_loads<2, false>),
    kLoad4("ldmatrix x4", matrix_loads<4, false>), kLoad1t("ldmatrix x1 trans", matrix_loads<1, true>),
    kLoad2t("ldmatrix x2 trans", matrix_loads<2, true>), kLoad4t("ldmatrix x4 trans", matrix_loads<4, true>);

// in: registers of a, b and d, lane by lane; out: of d.
template <typename T>
__global__ void products(Arguments a) {
  const int lane = threadIdx.x;
  uint32_t left[4], right[2];
  float sum[4];
  for (int i = 0; i < 4; ++i) left[i] = words(a, 0)[4 * lane + i];
  for (int i = 0; i < 2; ++i) right[i] = words(a, 1)[2 * lane + i];
  for (int i = 0; i < 4; ++i) sum[i] = bits_to_float(words(a, 2)[4 * lane + i]);
  if constexpr (sizeof(T) == 4) {
    device::mma_m16n8k8_tf32(sum, left, right);
  } else {
    device::mma_m16n8k16<T>(sum, left, right);
  }
  for (int i = 0; i < 4; ++i) results(a)[4 * lane + i] = float_to_bits(sum[i]);
}
const Register kHalf("mma f16", products<Half>), kBFloat("mma bf16", products<BFloat16>),
    kTf32("mma tf32", products<float>);

// Every thread copies its kBytes, of which n[0] are valid; the block then reads its neighbor's.
template <int kBytes>
__global__ void copies(Arguments a) {
  unsigned char* tile = device::dynamic_shared();
  const int thread = threadIdx.x;
  device::async_copy<kBytes>(tile + thread * kBytes, static_cast<const unsigned char*>(a.in[0]) + thread * kBytes,
                             a.n[0]);
  device::async_copy_commit();
  device::async_copy_wait<0>();
  device::sync_block();
  const int from = (thread + 1) % blockDim.x;
  for (int i = 0; i < kBytes; ++i) static_cast<unsigned char*>(a.out)[thread * kBytes + i] = tile[from * kBytes + i];
}
const Register kCopy4("async_copy 4", copies<4>), kCopy8("async_copy 8", copies<8>),
    kCopy16("async_copy 16", copies<16>);

struct OneBarrier {
  device::Mbarrier barrier;
};

// Three phases: in each all threads write their word and arrive; then each reads its neighbor's.
__global__ void arrivals(Arguments a) {
  auto* tile = reinterpret_cast<uint32_t*>(device::dynamic_shared());
  device::Mbarrier* barrier = &device::shared_variable<OneBarrier>().barrier;
  const int thread = threadIdx.x, threads = blockDim.x;
  if (thread == 0) device::mbarrier_init(barrier, threads);
  device::sync_block();
  for (int phase = 0; phase < 3; ++phase) {
    tile[phase * threads + thread] = words(a)[thread] + phase;
    device::mbarrier_arrive(barrier);
    if (phase == 1) {
      while (!device::mbarrier_test(barrier, phase & 1)) {
      }
    } else {
      device::mbarrier_wait(barrier, phase & 1);
    }
    results(a)[phase * threads + thread] = tile[phase * threads + (thread + 1) % threads];
  }
  device::sync_block();
  if (thread == 0) device::mbarrier_invalidate(barrier);
}
const Register kArrivals("mbarrier arrivals", arrivals);

// Two pairs of warps, each with a barrier of its own.
__global__ void pairs(Arguments a) {
  auto* tile = reinterpret_cast<uint32_t*>(device::dynamic_shared());
  const int thread = threadIdx.x, pair = thread / 64;
  tile[thread] = words(a)[thread];
  device::sync_named(1 + pair, 64);
  results(a)[thread] = tile[thread ^ 32];
}
const Register kPairs("pairs", pairs);

// The first warp arrives without waiting, the second waits and reads what the first wrote.
__global__ void one_way(Arguments a) {
  auto* tile = reinterpret_cast<uint32_t*>(device::dynamic_shared());
  const int thread = threadIdx.x;
  if (thread < 32) {
    tile[thread] = words(a)[thread];
    device::arrive_named(3, 64);
  } else {
    device::sync_named(3, 64);
    results(a)[thread - 32] = tile[63 - thread];
  }
}
const Register kOneWay("one way", one_way);

// Every thread copies a word for its neighbor: an mbarrier says when it is there. Then one of its own.
__global__ void copies_that_arrive(Arguments a) {
  auto* tile = reinterpret_cast<uint32_t*>(device::dynamic_shared());
  device::Mbarrier* barrier = &device::shared_variable<OneBarrier>().barrier;
  const int thread = threadIdx.x, threads = blockDim.x;
  if (thread == 0) device::mbarrier_init(barrier, threads);
  device::sync_block();
  device::async_copy<4>(tile + thread, words(a) + thread);
  device::async_copy_arrive(barrier);
  device::mbarrier_wait(barrier, 0);
  device::async_copy<4>(tile + threads + thread, words(a) + thread);
  device::async_copy_wait_all();
  results(a)[thread] = tile[(thread + 1) % threads] - tile[threads + thread];
}
const Register kCopiesArrive("async_copy arrive", copies_that_arrive);

// Thread and block coordinates.
__global__ void coordinates(Arguments a) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  results(a)[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}
const Register kCoordinates("coordinates", coordinates);

// Blocks of at most 64 threads.
__global__ void __launch_bounds__(64) bounded(Arguments a) { results(a)[threadIdx.x] = threadIdx.x; }
const Register kBounded("bounded", bounded);

}  // namespace
}  // namespace fastgen::kernels
