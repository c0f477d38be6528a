// Launchers of one storage type; the instantiations define one each.
#pragma once

#include "attention/backward.cuh"
#include "attention/forward.cuh"
#include "attention/launching.cuh"
#include "attention/mask_gradient.cuh"

namespace fastgen::attention {

template <typename T>
void forward(ForwardParams p, cudaStream_t stream) {
  const Sizes sizes = sizes_of(p.problem, sizeof(T));
  const Plan plan = forward_plan(sizes, device::multiprocessors());
  p.items = plan.items;
  dispatch_tile<kTiles>(plan.tile, [&]<int kKeyDim, int kValueDim>() {
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
  dispatch_tile<kTiles>(query_plan.tile, [&]<int kKeyDim, int kValueDim>() {
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
  const Plan plan = mask_plan(sizes_of(p.problem, sizeof(T)), gradient.sizes, device::multiprocessors(), false);
  dispatch_tile<kTiles>(plan.tile, [&]<int kKeyDim, int kValueDim>() {
    launch_mask<T>("attention_mask_gradient", +attention_mask_gradient<T, kKeyDim, kValueDim>, plan, p, gradient,
                   stream);
  });
}

}  // namespace fastgen::attention
