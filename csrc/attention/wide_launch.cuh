// Launchers of the kernels of wide heads, of one storage type.
#pragma once

#include "attention/combine_launch.cuh"
#include "attention/launching.cuh"
#include "attention/wide.cuh"
#include "attention/wide_backward.cuh"

namespace fastgen::attention {

template <typename T>
int64_t wide_forward_workspace(const Problem& problem) {
  const Sizes sizes = sizes_of(problem, sizeof(T));
  if (!is_wide(sizes.head_dims())) return 0;  // most calls: without a question to the device
  return split_floats(sizes, wide_forward_plan(sizes, current_gpu()).splits);
}

template <typename T>
void launch_forward_wide(ForwardParams p, void* stream) {
  const Sizes sizes = sizes_of(p.problem, sizeof(T));
  const Plan plan = wide_forward_plan(sizes, current_gpu());
  p.stages = plan.stages, p.splits = plan.splits;
  if (p.splits > 1 && p.parts == nullptr) throw Error("attention_forward_wide", "split keys need a workspace");
  device::Launch config = launch_config(plan, stream);
  config.grid.y = static_cast<unsigned>(p.splits);
  dispatch_head_dims<kWideHeadDims>(plan.dims, [&]<int kKeyDim, int kValueDim>() {
    dispatch_bool(sizes.plain, [&](auto plain) {
      constexpr auto kernel = attention_forward_wide<T, kKeyDim, kValueDim, decltype(plain)::value>;
      device::launch("attention_forward_wide", +kernel, config, p);
    });
  });
  launch_combine<T, kWideHeadDims[length(kWideHeadDims) - 1].value>(p, sizes, stream);
}

template <typename T>
void launch_backward_query_wide(BackwardParams p, void* stream) {
  const Sizes sizes = sizes_of(p.problem, sizeof(T));
  const Plan plan = wide_backward_query_plan(sizes, current_gpu());
  p.stages = plan.stages;
  dispatch_head_dims<kWideHeadDims>(plan.dims, [&]<int kKeyDim, int kValueDim>() {
    dispatch_bool(sizes.plain, [&](auto plain) {
      constexpr auto kernel = attention_backward_query_wide<T, kKeyDim, kValueDim, decltype(plain)::value>;
      device::launch("attention_backward_query_wide", +kernel, launch_config(plan, stream), p);
    });
  });
}

template <typename T>
void launch_backward_key_value_wide(BackwardParams p, void* stream) {
  const Sizes sizes = sizes_of(p.problem, sizeof(T));
  const Plan plan = wide_backward_key_value_plan(sizes, current_gpu());
  p.stages = plan.stages;
  dispatch_head_dims<kWideHeadDims>(plan.dims, [&]<int kKeyDim, int kValueDim>() {
    dispatch_bool(sizes.plain, [&](auto plain) {
      constexpr auto kernel = attention_backward_key_value_wide<T, kKeyDim, kValueDim, decltype(plain)::value>;
      device::launch("attention_backward_key_value_wide", +kernel, launch_config(plan, stream), p);
    });
  });
}

}  // namespace fastgen::attention
