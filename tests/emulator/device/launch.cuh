// Host twin of csrc/device/launch.cuh: the grid, block by block.
#pragma once

#include "device/threads.h"

namespace fastgen::device {

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
};

template <typename... Args>
void launch(const char* name, void (*kernel)(Args...), const Launch& config, Args... args) {
  constexpr unsigned kMaxThreads = 1024, kMaxGridY = 65535;
  if (config.grid.x == 0 || config.grid.y == 0 || config.grid.y > kMaxGridY || config.block.x > kMaxThreads) {
    throw std::runtime_error(std::string(name) + ": invalid configuration argument");
  }
  const int threads = static_cast<int>(config.block.x);
  for (unsigned y = 0; y < config.grid.y; ++y) {
    for (unsigned x = 0; x < config.grid.x; ++x) {
      Block block(threads);
      std::vector<std::thread> running;
      for (int thread = 0; thread < threads; ++thread) {
        running.emplace_back([&, thread] {
          threadIdx = dim3(thread, 0, 0), blockIdx = dim3(x, y, 0), current_block = &block;
          kernel(args...);
          // A thread that has returned no longer counts in any barrier.
          block.everyone.arrive_and_drop();
          block.warps[thread / kWarpSize]->arrive_and_drop();
        });
      }
      for (std::thread& thread : running) thread.join();
    }
  }
}

// Few, so that small tests see rows that are split among blocks.
inline int multiprocessors() { return 3; }

}  // namespace fastgen::device
