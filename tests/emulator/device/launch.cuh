// Host twin of csrc/device/launch.cuh.
#pragma once

#include <tuple>

#include "device/language.h"

namespace fastgen::device {

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
};

template <typename... Args>
void launch(const char* name, void (*kernel)(Args...), const Launch& config, Args... args) {
  struct Call {
    void (*kernel)(Args...);
    std::tuple<Args...> args;
  } call = {kernel, {args...}};
  const auto run = [](void* given) {
    const auto& call = *static_cast<const Call*>(given);
    std::apply(call.kernel, call.args);
  };
  emulator::run_grid(name, {config.grid, config.block, config.shared_bytes, run, &call, sizeof(call)});
}

// Few, so that small tests cover splits and tiles_per_block > 1.
inline int multiprocessors() { return 3; }

}  // namespace fastgen::device
