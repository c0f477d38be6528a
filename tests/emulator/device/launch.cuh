// Host twin of csrc/device/launch.cuh.
#pragma once

#include <tuple>

#include "common/error.h"
#include "device/language.h"

namespace fastgen::device {

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
};

// A dimension of a grid, at most ``most``: 2147483647 in x, 65535 in y and z.
inline unsigned grid_size(int64_t blocks, const char* name, int64_t most = INT32_MAX) {
  if (blocks < 0 || blocks > most) throw Error(name, "more elements than one launch has blocks for");
  return static_cast<unsigned>(blocks);
}

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
  const auto* code = reinterpret_cast<const void*>(kernel);
  emulator::run_grid(name, {config.grid, config.block, config.shared_bytes, run, &call, sizeof(call), code});
}

// Few, so that small tests cover splits and tiles_per_block > 1.
inline int multiprocessors() { return 3; }

// configure(shared_limit=...)
inline int shared_limit() { return static_cast<int>(emulator::shared_limit()); }

// Of the GPUs with this much: sm_80 or sm_90.
inline int architecture() {
  constexpr size_t kShared90 = 227 * 1024;
  return emulator::shared_limit() >= kShared90 ? 90 : 80;
}

}  // namespace fastgen::device
