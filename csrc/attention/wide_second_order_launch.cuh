// Launchers of tangents and second derivatives of wide heads, of one storage type.
#pragma once

#include "attention/mask_launch.cuh"
#include "attention/wide_mask_second_order.cuh"

namespace fastgen::attention {

template <typename T>
void launch_tangent_wide(TangentParams p, void* stream) {
  const Plan plan = tangent_plan(sizes_of(p.problem, sizeof(T)), current_gpu());
  p.stages = plan.stages;
  dispatch_head_dims<kWideSecondOrderHeadDims>(plan.dims, [&]<int kKeyDim, int kValueDim>() {
    device::launch("attention_tangent_wide", +attention_tangent_wide<T, kKeyDim, kValueDim>,
                   launch_config(plan, stream), p);
  });
}

template <typename T>
void launch_second_order_query_wide(SecondOrderParams p, void* stream) {
  const Plan plan = second_order_query_plan(sizes_of(p.first.problem, sizeof(T)), current_gpu());
  p.first.stages = plan.stages;
  dispatch_head_dims<kWideSecondOrderHeadDims>(plan.dims, [&]<int kKeyDim, int kValueDim>() {
    device::launch("attention_second_order_query_wide", +attention_second_order_query_wide<T, kKeyDim, kValueDim>,
                   launch_config(plan, stream), p);
  });
}

template <typename T>
void launch_second_order_key_value_wide(SecondOrderParams p, void* stream) {
  const Plan plan = second_order_key_value_plan(sizes_of(p.first.problem, sizeof(T)), current_gpu());
  p.first.stages = plan.stages;
  dispatch_head_dims<kWideSecondOrderHeadDims>(plan.dims, [&]<int kKeyDim, int kValueDim>() {
    device::launch("attention_second_order_key_value_wide",
                   +attention_second_order_key_value_wide<T, kKeyDim, kValueDim>, launch_config(plan, stream), p);
  });
}

template <typename T>
void launch_mask_second_order_wide(SecondOrderParams p, const MaskGradient& gradient, void* stream) {
  const Plan plan = mask_plan(sizes_of(p.first.problem, sizeof(T)), gradient.sizes, device::multiprocessors(), true);
  dispatch_head_dims<kWideSecondOrderHeadDims>(plan.dims, [&]<int kKeyDim, int kValueDim>() {
    launch_mask<T>("attention_mask_second_order_wide", +attention_mask_second_order_wide<T, kKeyDim, kValueDim>, plan,
                   p, gradient, stream);
  });
}

}  // namespace fastgen::attention
