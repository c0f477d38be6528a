// Correct kernels that an imprecise checker would reject, or never finish. All write 1 for each thread.
#include "device/atomic.cuh"
#include "device/barrier.cuh"
#include "device/copy.cuh"
#include "device/mbarrier.cuh"
#include "device/vector.cuh"
#include "device/warp.cuh"
#include "kernels/registry.h"

namespace fastgen::kernels {
namespace {

struct Words {
  alignas(16) uint32_t of[64];
};
struct First {
  device::Mbarrier barrier;
};
struct Second {
  device::Mbarrier barrier;
};
struct Flag {
  uint32_t up;
};

__device__ __forceinline__ void done(const Arguments& a) {
  results(a)[threadIdx.x + blockDim.x * (threadIdx.y + blockIdx.x * blockDim.y)] = 1;
}

// One thread polls an mbarrier; the thread that completes it then polls the result of the first.
__global__ void asks_while_another_spins(Arguments a) {
  device::Mbarrier* barrier = &device::shared_variable<First>().barrier;
  Flag& flag = device::shared_variable<Flag>();
  if (threadIdx.x == 0) device::mbarrier_init(barrier, 1), flag.up = 0;
  device::sync_block();
  if (threadIdx.x == 0) {
    while (!device::mbarrier_test(barrier, 0)) {
    }
    device::atomic_exchange(&flag.up, 1u);
  }
  if (threadIdx.x == 32) {
    device::mbarrier_arrive(barrier);
    while (device::atomic_add(&flag.up, 0u) == 0) {
    }
  }
  done(a);
}
const Register kAsks("asks while another spins", asks_while_another_spins);

// After many unsuccessful polls the thread itself completes the phase that it polls.
__global__ void asks_many_times(Arguments a) {
  device::Mbarrier* first = &device::shared_variable<First>().barrier;
  device::Mbarrier* second = &device::shared_variable<Second>().barrier;
  if (threadIdx.x == 0) device::mbarrier_init(first, 1), device::mbarrier_init(second, 1);
  device::sync_block();
  if (threadIdx.x == 0) {
    for (int asked = 0; !device::mbarrier_test(first, 0); ++asked) {
      if (asked == 1500) device::mbarrier_arrive(second);
    }
  }
  if (threadIdx.x == 32) device::mbarrier_wait(second, 0), device::mbarrier_arrive(first);
  done(a);
}
const Register kAsksMany("asks many times", asks_many_times);

// A lock, held by one thread of each warp in turn.
__global__ void lock(Arguments a) {
  Flag& flag = device::shared_variable<Flag>();
  if (threadIdx.x == 0) flag.up = 0;
  device::sync_block();
  if (threadIdx.x % 32 == 0) {
    while (device::atomic_compare_exchange(&flag.up, 0u, 1u) != 0u) {
    }
    device::atomic_exchange(&flag.up, 0u);
  }
  done(a);
}
const Register kLock("lock", lock);

// One lane arrives for its warp, one lane waits for its warp; sync_warp propagates the order.
__global__ void elected_lanes(Arguments a) {
  Words& tile = device::shared_variable<Words>();
  device::Mbarrier* full = &device::shared_variable<First>().barrier;
  device::Mbarrier* empty = &device::shared_variable<Second>().barrier;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) device::mbarrier_init(full, 1), device::mbarrier_init(empty, 32);
  device::sync_block();
  uint32_t sum = 0;
  for (int round = 0; round < 9; ++round) {
    if (threadIdx.x < 32) {
      if (lane == 0) {
        while (!device::mbarrier_test(empty, (round & 1) ^ 1)) {
        }
      }
      device::sync_warp();
      tile.of[lane] = round;
      device::sync_warp();
      if (lane == 0) device::mbarrier_arrive(full);
    } else {
      device::mbarrier_wait(full, round & 1);
      sum += tile.of[31 - lane];
      device::mbarrier_arrive(empty);
    }
  }
  results(a)[threadIdx.x] = threadIdx.x < 32 || sum == 36 ? 1 : 0;
}
const Register kElected("elected lanes", elected_lanes);

// Warps exit that no barrier expects; the halves of a warp diverge with matching masks.
__global__ void leaves_and_halves(Arguments a) {
  done(a);
  if (threadIdx.x >= 64) return;
  device::sync_named(1, 64);
  const bool low = threadIdx.x % 32 < 16;
  const unsigned mask = low ? 0x0000ffffu : 0xffff0000u;
  uint32_t word = threadIdx.x;
  if (low) {
    word = device::shuffle_xor(word, 1, mask);
    device::sync_warp(mask);
    word = device::shuffle_xor(word, 1, mask);
  } else {
    device::sync_warp(mask);
    word = device::shuffle_xor(device::shuffle_xor(word, 4, mask), 4, mask);
  }
  if (word != threadIdx.x) results(a)[threadIdx.x] = 0;
  device::sync_named(0, 64);
}
const Register kLeaves("leaves and halves", leaves_and_halves);

// Blocks read the same words of global memory, and each writes its own.
__global__ void blocks_read_alike(Arguments a) {
  const uint32_t word = words(a)[0] + words(a)[threadIdx.x];
  device::sync_block();
  if (word != ~0u) done(a);
}
const Register kAlike("blocks read alike", blocks_read_alike);

struct Pair {
  uint64_t first, second;
};
struct Small {
  bool even[64];
  uint8_t byte[64];
};

__attribute__((noinline)) __device__ int look_up(const int* table, int i) { return table[i]; }

// Sixteen bytes that are aligned to eight, bytes and bools, tables of constants, arrays handed on, odd addresses.
__global__ void kinds_of_data(Arguments a) {
  Small& small = device::shared_variable<Small>();
  const int thread = threadIdx.x;
  const Pair pair = reinterpret_cast<const Pair*>(static_cast<const char*>(a.in[0]) + 8)[thread];
  small.even[thread] = thread % 2 == 0, small.byte[thread] = static_cast<uint8_t>(thread);
  device::sync_block();
  static constexpr int kTable[4] = {3, 1, 4, 1};
  int local[4] = {thread, 1, 2, 3};
  const auto add = [&](int (&numbers)[4], int i) { return numbers[i % 4] += small.byte[63 - thread]; };
  uint32_t odd;
  memcpy(&odd, static_cast<const char*>(a.in[0]) + 1 + 4 * thread, sizeof(odd));
  const int sum = add(local, thread) + look_up(kTable, thread % 4) + kTable[(thread + 1) % 4] + small.even[63 - thread];
  if (pair.first + pair.second + odd + static_cast<uint64_t>(sum) != ~uint64_t{0}) done(a);
}
const Register kData("kinds of data", kinds_of_data);

// A block that is no whole number of warps, in two dimensions.
__global__ void odd_block(Arguments a) {
  Words& tile = device::shared_variable<Words>();
  const int thread = threadIdx.x + blockDim.x * threadIdx.y, threads = blockDim.x * blockDim.y;
  tile.of[thread] = thread;
  device::sync_block();
  if (tile.of[threads - 1 - thread] + thread == static_cast<uint32_t>(threads - 1)) done(a);
}
const Register kOdd("odd block", odd_block);

// Every thread reads every word.
__global__ void everyone_reads(Arguments a) {
  Words& tile = device::shared_variable<Words>();
  if (threadIdx.x < 64) tile.of[threadIdx.x] = 1;
  device::sync_block();
  uint32_t sum = 0;
  for (const uint32_t word : tile.of) sum += word;
  if (sum == 64) done(a);
}
const Register kEveryone("everyone reads", everyone_reads);

}  // namespace
}  // namespace fastgen::kernels
