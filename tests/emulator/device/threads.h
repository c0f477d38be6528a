// CUDA's execution model on the host: a thread of the block is a thread of the process, a barrier a barrier.
//
// Blocks run one after the other, so a __shared__ variable can be a static one. Enough to run the kernels'
// arithmetic, indexing and synchronisation; it finds no races.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;

namespace fastgen::device {

constexpr int kWarpSize = 32;

struct Block {
  explicit Block(int threads) : slots(threads), everyone(threads) {
    for (int first = 0; first < threads; first += kWarpSize) {
      warps.push_back(std::make_unique<std::barrier<>>(std::min(kWarpSize, threads - first)));
    }
  }

  std::vector<float> slots;  // what each thread offers in a shuffle
  std::barrier<> everyone;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
};

inline thread_local Block* current_block = nullptr;

}  // namespace fastgen::device

inline thread_local dim3 threadIdx, blockIdx;
