// What the launchers share.
#pragma once

#include <stdexcept>
#include <utility>

#include "attention/config.h"
#include "attention/sum_parts.cuh"
#include "common/dispatch.h"
#include "device/launch.cuh"

namespace fastgen::attention {

// Calls body.operator()<key_dim, value_dim>() with the dims of a tile, which is one of kTable.
template <const auto& kTable, typename Body>
void dispatch_tile(Dims tile, Body&& body) {
  const auto one = [&]<size_t i>() {
    constexpr Dims kDims = kTable[i];
    if (tile.key == kDims.key && tile.value == kDims.value) body.template operator()<kDims.key, kDims.value>();
  };
  [&]<size_t... i>(std::index_sequence<i...>) {
    (one.template operator()<i>(), ...);
  }(std::make_index_sequence<std::size(kTable)>{});
}

inline device::Launch launch_config(const Plan& plan, cudaStream_t stream) {
  if (plan.blocks > INT32_MAX || plan.slices > UINT16_MAX) {
    throw std::runtime_error("attention: batch * heads * length is more than one launch has blocks for");
  }
  return {dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.slices)),
          dim3(static_cast<unsigned>(32 * plan.warps)), static_cast<size_t>(plan.shared_bytes), stream};
}

// The gradient of a mask, by ``kernel``, and the sum of its parts.
template <typename T, typename Params>
void launch_mask(const char* name, void (*kernel)(Params, MaskGradient), Plan plan, const Params& p,
                 const MaskGradient& gradient, cudaStream_t stream) {
  plan.slices = gradient.splits;
  device::launch(name, kernel, launch_config(plan, stream), p, gradient);
  if (gradient.splits > 1) {
    const dim3 grid(static_cast<unsigned>(ceil_div(elements(gradient), kSumThreads)));
    device::launch("attention_sum_parts", +attention_sum_parts<T>, {grid, dim3(kSumThreads), 0, stream}, gradient);
  }
}

}  // namespace fastgen::attention
