// Launchers of one storage type; the instantiations define one each.
#pragma once

#include <stdexcept>
#include <utility>

#include "attention/backward.cuh"
#include "attention/forward.cuh"
#include "attention/mask_gradient.cuh"
#include "attention/sum_parts.cuh"
#include "common/dispatch.h"
#include "device/launch.cuh"

namespace fastgen::attention {

// Calls body.operator()<key_dim, value_dim>() with the dims of a tile.
template <typename Body>
void dispatch_tile(Dims tile, Body&& body) {
  const auto one = [&]<size_t i>() {
    constexpr Dims kDims = kTiles[i];
    if (tile.key == kDims.key && tile.value == kDims.value) body.template operator()<kDims.key, kDims.value>();
  };
  [&]<size_t... i>(std::index_sequence<i...>) {
    (one.template operator()<i>(), ...);
  }(std::make_index_sequence<kTileCount>{});
}

inline device::Launch launch_config(const Plan& plan, cudaStream_t stream) {
  if (plan.blocks > INT32_MAX || plan.slices > UINT16_MAX) {
    throw std::runtime_error("attention: batch * heads * length is more than one launch has blocks for");
  }
  return {dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.slices)),
          dim3(static_cast<unsigned>(32 * plan.warps)), static_cast<size_t>(plan.shared_bytes), stream};
}

template <typename T>
void forward(ForwardParams p, cudaStream_t stream) {
  const Sizes sizes = sizes_of(p.problem, sizeof(T));
  const Plan plan = forward_plan(sizes, device::multiprocessors());
  p.items = plan.items;
  dispatch_tile(plan.tile, [&]<int kKeyDim, int kValueDim>() {
    dispatch_bool(sizes.plain, [&](auto plain) {
      constexpr auto kernel = attention_forward<T, kKeyDim, kValueDim, decltype(plain)::value>;
      device::launch("attention_forward", +kernel, launch_config(plan, stream), p);
    });
  });
}

template <typename T>
void backward(const BackwardParams& p, cudaStream_t stream) {
  const Sizes sizes = sizes_of(p.problem, sizeof(T));
  const Plan query_plan = attention::query_plan(sizes), key_value_plan = attention::key_value_plan(sizes);
  dispatch_tile(query_plan.tile, [&]<int kKeyDim, int kValueDim>() {
    dispatch_bool(sizes.plain, [&](auto plain) {
      constexpr auto query = attention_backward_query<T, kKeyDim, kValueDim, decltype(plain)::value>;
      constexpr auto key_value = attention_backward_key_value<T, kKeyDim, kValueDim, decltype(plain)::value>;
      device::launch("attention_backward_query", +query, launch_config(query_plan, stream), p);
      if (p.problem.keys > 0) {
        device::launch("attention_backward_key_value", +key_value, launch_config(key_value_plan, stream), p);
      }
    });
  });
}

template <typename T>
void mask_gradient(const BackwardParams& p, const MaskGradient& gradient, cudaStream_t stream) {
  const Sizes sizes = sizes_of(p.problem, sizeof(T));
  Plan plan = mask_plan(sizes, gradient.sizes, device::multiprocessors());
  plan.slices = gradient.splits;
  dispatch_tile(plan.tile, [&]<int kKeyDim, int kValueDim>() {
    device::launch("attention_mask_gradient", +attention_mask_gradient<T, kKeyDim, kValueDim>,
                   launch_config(plan, stream), p, gradient);
  });
  if (gradient.splits > 1) {
    const dim3 grid(static_cast<unsigned>(ceil_div(elements(gradient), kSumThreads)));
    device::launch("attention_sum_parts", +attention_sum_parts<T>, {grid, dim3(kSumThreads), 0, stream}, gradient);
  }
}

}  // namespace fastgen::attention
