// Unit kernels, as in unit.cu, of the instructions that sm_90a alone has, and of tensor copies, which they need.
#include <type_traits>

#include "device/barrier.cuh"
#include "device/fence.cuh"
#include "device/registers.cuh"
#include "device/tensor_copy.cuh"
#include "device/wgmma.cuh"
#include "kernels/chain.cuh"
#include "kernels/registry.h"
#include "kernels/stores.cuh"

namespace fastgen::kernels {
namespace {

constexpr int kRowBytes = 128;

struct CopyBarrier {
  device::Mbarrier barrier;
};

// By thread 0 of the block, which has to synchronize after it.
__device__ __forceinline__ device::Mbarrier* copy_barrier() {
  device::Mbarrier* barrier = &device::shared_variable<CopyBarrier>().barrier;
  if (threadIdx.x == 0) {
    device::mbarrier_init(barrier, 1);
    device::fence_mbarrier_init();
  }
  device::sync_block();
  return barrier;
}

// in[1]: coordinates; out: the box of n[1] rows as it lies in shared memory.
__global__ void tensor_loads(const __grid_constant__ MappedArguments a) {
  unsigned char* tile = device::dynamic_shared();
  device::Mbarrier* barrier = copy_barrier();
  const int rows = a.n[1];
  if (threadIdx.x == 0) {
    int at[device::kTensorDims];
    for (int i = 0; i < device::kTensorDims; ++i) at[i] = static_cast<int>(words(a, 1)[i]);
    device::mbarrier_arrive_expect(barrier, rows * kRowBytes);
    device::tensor_load(tile, a.maps[0], at, barrier);
  }
  device::mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < rows * kRowBytes / 4; i += blockDim.x) {
    results(a)[i] = reinterpret_cast<const uint32_t*>(tile)[i];
  }
}
const Register kTensorLoads("tensor_load", tensor_loads);

// in: n[0] tiles of n[4] rows as they lie in shared memory, and the coordinates of each; out: the tensor that has them.
// A group has n[1] tiles; n[2] empty groups follow. Once all but the newest group are read, the first n[3] tiles are
// overwritten.
__global__ void tensor_stores(const __grid_constant__ MappedArguments a) {
  auto* tiles = reinterpret_cast<uint32_t*>(device::dynamic_shared());
  const int tile_words = a.n[4] * kRowBytes / 4;
  for (int i = threadIdx.x; i < a.n[0] * tile_words; i += blockDim.x) tiles[i] = words(a)[i];
  device::fence_async_proxy();
  device::sync_block();
  if (threadIdx.x == 0) {
    for (int tile = 0; tile < a.n[0]; ++tile) {
      int at[device::kTensorDims];
      for (int i = 0; i < device::kTensorDims; ++i) {
        at[i] = static_cast<int>(words(a, 1)[tile * device::kTensorDims + i]);
      }
      device::tensor_store(a.out_map, at, tiles + tile * tile_words);
      if ((tile + 1) % a.n[1] == 0) device::tensor_store_commit();
    }
    for (int i = 0; i < a.n[2]; ++i) device::tensor_store_commit();
    device::tensor_store_wait_read<1>();
  }
  device::sync_block();
  for (int i = threadIdx.x; i < a.n[3] * tile_words; i += blockDim.x) tiles[i] = 0;
  if (threadIdx.x == 0) device::tensor_store_wait<0>();
}
const Register kTensorStores("tensor_store", tensor_stores);

// in: A (64, 64) and B, the latter (8 kTiles, 64) or with Rows::kDepth (64, 8 kTiles); out: A B, of each thread its
// fragments. The tile of A is written by the threads.
template <typename T, int kTiles, device::Rows kRows, bool kInRegisters>
__global__ void products(const __grid_constant__ MappedArguments a) {
  constexpr int kDepth = 64, kTileBytes = 64 * kRowBytes, kColumns = 8 * kTiles;
  constexpr bool kDown = kRows == device::Rows::kDepth;
  unsigned char *left = device::dynamic_shared(), *right = left + kTileBytes;
  const int thread = static_cast<int>(threadIdx.x), row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4;
  for (int i = thread; i < kTileBytes / 4; i += device::kWarpgroupSize) {
    const int swizzled = i ^ (i >> 5 & 7) << 2;  // in words
    reinterpret_cast<uint32_t*>(left)[swizzled] = words(a)[i];
  }
  device::fence_async_proxy();
  device::Mbarrier* barrier = copy_barrier();
  if (thread == 0) {
    device::mbarrier_arrive_expect(barrier, kColumns * kRowBytes);
    for (int panel = 0; panel < (kDown ? kColumns / device::kPanelColumns : 1); ++panel) {
      const int at[] = {panel * device::kPanelColumns, 0, 0, 0};
      device::tensor_load(right + panel * kTileBytes, a.maps[1], at, barrier);
    }
  }
  device::mbarrier_wait(barrier, 0);
  float d[kTiles][4];
  uint32_t registers[kDepth / device::kWgmmaDepth][4];
#pragma unroll
  for (int k = 0; k < kDepth / device::kWgmmaDepth; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      registers[k][i] = words(a)[(row + i % 2 * 8) * (kDepth / 2) + k * 8 + column + i / 2 * 4];
    }
  }
  const auto left_tile = device::matrix_tile<device::Rows::kOuter>(left);
  const auto right_tile = device::matrix_tile<kRows>(right, kTileBytes);
  device::hold_registers(d);
  device::wgmma_fence(d, registers);
#pragma unroll
  for (int k = 0; k < kDepth / device::kWgmmaDepth; ++k) {
    const auto b = right_tile.from(k * (kDown ? device::kWgmmaDepth * kRowBytes : 32));
    if constexpr (kInRegisters) {
      device::wgmma<T>(d, registers[k], b, k > 0);
    } else {
      device::wgmma<T>(d, left_tile.from(32 * k), b, k > 0);
    }
  }
  device::wgmma_commit();
  device::compute_before_wait(static_cast<float>(thread));
  device::wgmma_wait<0>(d, registers);
  device::fence_after_wait(d);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      results(a)[(row + i / 2 * 8) * kColumns + tile * 8 + 2 * column + i % 2] = float_to_bits(d[tile][i]);
    }
  }
}

using device::Rows;
#define FASTGEN_PRODUCTS(type, name, tiles)                                            \
  {"wgmma " name " tile outer", products<type, tiles, Rows::kOuter, false>},           \
      {"wgmma " name " tile depth", products<type, tiles, Rows::kDepth, false>},       \
      {"wgmma " name " registers outer", products<type, tiles, Rows::kOuter, true>}, { \
    "wgmma " name " registers depth", products<type, tiles, Rows::kDepth, true>        \
  }
const Register kProducts[] = {FASTGEN_PRODUCTS(Half, "f16 64", 8),
                              FASTGEN_PRODUCTS(Half, "f16 128", 16),
                              FASTGEN_PRODUCTS(BFloat16, "bf16 64", 8),
                              FASTGEN_PRODUCTS(BFloat16, "bf16 128", 16),
                              {"wgmma f16 80 tile outer", products<Half, 10, Rows::kOuter, false>},
                              {"wgmma f16 96 tile outer", products<Half, 12, Rows::kOuter, false>},
                              {"wgmma f16 160 tile outer", products<Half, 20, Rows::kOuter, false>},
                              {"wgmma bf16 160 tile outer", products<BFloat16, 20, Rows::kOuter, false>},
                              {"wgmma bf16 80 tile outer", products<BFloat16, 10, Rows::kOuter, false>},
                              {"wgmma bf16 96 tile outer", products<BFloat16, 12, Rows::kOuter, false>}};

// Two warpgroups; out: the number of each thread.
__global__ void __launch_bounds__(256, 1) register_shares(Arguments a) {
  if (threadIdx.x < device::kWarpgroupSize) {
    device::decrease_registers<24>();
    results(a)[threadIdx.x] = threadIdx.x;
  } else {
    device::increase_registers<256>();
    results(a)[threadIdx.x] = threadIdx.x;
  }
}
const Register kRegisterShares("registers", register_shares);

const Register kChain("chain", chain::kernel<chain::kNone>);
const Register kStores("stores", stores::kernel<stores::kNone>);

}  // namespace
}  // namespace fastgen::kernels
