// What the launchers share: the GPU, dispatch by head dims, launch configuration.
#pragma once

#include <utility>

#include "attention/launchers.h"
#include "attention/plan.h"
#include "common/dispatch.h"
#include "common/error.h"
#include "device/launch.cuh"

namespace fastgen::attention {

// Calls body.operator()<key_dim, value_dim>() for the entry of kTable that equals ``dims``.
template <const auto& kTable, typename Body>
void dispatch_head_dims(Dims dims, Body&& body) {
  const auto one = [&]<size_t i>() {
    constexpr Dims kDims = kTable[i];
    if (dims.key == kDims.key && dims.value == kDims.value) body.template operator()<kDims.key, kDims.value>();
  };
  [&]<size_t... i>(std::index_sequence<i...>) {
    (one.template operator()<i>(), ...);
  }(std::make_index_sequence<length(kTable)>{});
}

inline Gpu current_gpu() { return {device::multiprocessors(), device::shared_limit()}; }

inline device::Launch launch_config(const Plan& plan, void* stream) {
  return {dim3(device::grid_size(plan.blocks, "attention"), device::grid_size(plan.slices, "attention", UINT16_MAX)),
          dim3(static_cast<unsigned>(32 * plan.warps)), static_cast<size_t>(plan.shared_bytes),
          static_cast<cudaStream_t>(stream)};
}

}  // namespace fastgen::attention
