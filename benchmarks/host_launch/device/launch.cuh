// Twin of csrc/device/launch.cuh for host_path.py: everything up to the launch, which returns at once.
#pragma once

#include <cstdint>

#include "common/error.h"
#include "device/language.h"

namespace fastgen::device {

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
};

inline unsigned grid_size(int64_t blocks, const char* name, int64_t most = INT32_MAX) {
  if (blocks < 0 || blocks > most) throw Error(name, "more elements than one launch has blocks for");
  return static_cast<unsigned>(blocks);
}

// Launches so far, over all libraries that were loaded.
inline int64_t launches = 0;

template <typename... Args>
__attribute__((always_inline)) inline void launch(const char*, void (*)(Args...), const Launch& config, Args... args) {
  // As the driver's call does, reads the grid and the addresses of the arguments.
  const void* pointers[] = {&args...};
  asm volatile("" : : "r"(config.grid.x), "r"(pointers) : "memory");
  ++launches;
}

// Of an H200.
inline int multiprocessors() { return 132; }
inline int shared_limit() { return 227 * 1024; }

}  // namespace fastgen::device
