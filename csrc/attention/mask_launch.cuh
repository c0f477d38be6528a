// Launches of the kernels of mask gradients.
#pragma once

#include "attention/launching.cuh"
#include "attention/mask_gradient.cuh"

namespace fastgen::attention {

// Adds the partial sums of a mask's gradient, if there are any.
template <typename T>
void launch_sum_parts(const MaskGradient& gradient, void* stream) {
  if (gradient.splits <= 1) return;
  const char* name = "attention_sum_parts";
  const int team = sum_team(elements(gradient), gradient.splits);
  const dim3 grid(device::grid_size(ceil_div(elements(gradient), kSumThreads / team), name));
  device::launch(name, +attention_sum_parts<T>, {grid, dim3(kSumThreads), 0, static_cast<cudaStream_t>(stream)},
                 gradient, team);
}

// ``kernel``, and the reduction of its partial sums.
template <typename T, typename Params>
void launch_mask(const char* name, void (*kernel)(Params, MaskGradient), Plan plan, const Params& p,
                 const MaskGradient& gradient, void* stream) {
  plan.slices = gradient.splits;
  device::launch(name, kernel, launch_config(plan, stream), p, gradient);
  launch_sum_parts<T>(gradient, stream);
}

}  // namespace fastgen::attention
