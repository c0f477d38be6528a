// Launchers of tangents and second derivatives, of one storage type.
#pragma once

#include "attention/launching.cuh"
#include "attention/mask_second_order.cuh"
#include "attention/second_order.cuh"
#include "attention/tangent.cuh"

namespace fastgen::attention {

template <typename T>
void tangent(const TangentParams& p, cudaStream_t stream) {
  const Sizes sizes = sizes_of(p.problem, sizeof(T));
  const Plan plan = tangent_plan(sizes);
  dispatch_tile<kTwiceTiles>(plan.tile, [&]<int kKeyDim, int kValueDim>() {
    dispatch_bool(sizes.plain, [&](auto plain) {
      constexpr auto kernel = attention_tangent<T, kKeyDim, kValueDim, decltype(plain)::value>;
      device::launch("attention_tangent", +kernel, launch_config(plan, stream), p);
    });
  });
}

template <typename T>
void second_order(const SecondOrderParams& p, cudaStream_t stream) {
  const Sizes sizes = sizes_of(p.first.problem, sizeof(T));
  const Plan query_plan = second_order_query_plan(sizes), key_value_plan = second_order_key_value_plan(sizes);
  dispatch_tile<kTwiceTiles>(query_plan.tile, [&]<int kKeyDim, int kValueDim>() {
    device::launch("attention_second_order_query", +attention_second_order_query<T, kKeyDim, kValueDim>,
                   launch_config(query_plan, stream), p);
    if (p.first.problem.keys > 0) {
      device::launch("attention_second_order_key_value", +attention_second_order_key_value<T, kKeyDim, kValueDim>,
                     launch_config(key_value_plan, stream), p);
    }
  });
}

template <typename T>
void mask_second_order(const SecondOrderParams& p, const MaskGradient& gradient, cudaStream_t stream) {
  const Plan plan = mask_plan(sizes_of(p.first.problem, sizeof(T)), gradient.sizes, device::multiprocessors(), true);
  dispatch_tile<kTwiceTiles>(plan.tile, [&]<int kKeyDim, int kValueDim>() {
    launch_mask<T>("attention_mask_second_order", +attention_mask_second_order<T, kKeyDim, kValueDim>, plan, p,
                   gradient, stream);
  });
}

}  // namespace fastgen::attention
