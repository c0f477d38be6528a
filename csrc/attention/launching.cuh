// What the launchers share: the GPU, dispatch by head dims, launch configuration.
#pragma once

#include <type_traits>
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

// Calls body(std::bool_constant<kPlain>{}). Kernels without masks, dropout and softcap are compiled apart where that
// pays for its build time: not in float32, where products take most of the time, and not for head dims that are rare.
template <typename T, int kKeyDim, int kValueDim, typename Body>
void dispatch_plain(bool plain, Body&& body) {
  constexpr bool kRare = kKeyDim == 192;
  if constexpr (sizeof(T) == 2 && !kRare) {
    if (plain) return body(std::true_type{});
  }
  body(std::false_type{});
}

inline Gpu current_gpu() { return {device::multiprocessors(), device::shared_limit()}; }

inline device::Launch launch_config(const Plan& plan, void* stream) {
  device::grid_size(plan.blocks * plan.tiles_per_block, "attention", UINT32_MAX);  // kernels count tiles in 32 bits
  return {dim3(device::grid_size(plan.blocks, "attention"), device::grid_size(plan.slices, "attention", UINT16_MAX)),
          dim3(static_cast<unsigned>(32 * plan.warps)), static_cast<size_t>(plan.shared_bytes),
          static_cast<cudaStream_t>(stream)};
}

}  // namespace fastgen::attention
