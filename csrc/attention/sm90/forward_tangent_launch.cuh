// Launcher of the forward pass with its tangent, of one storage type. An instantiation file enters it in
// tangent_launcher.h.
#pragma once

#include "attention/sm90/forward_tangent.cuh"
#include "attention/sm90/tangent_launch.cuh"

namespace fastgen::attention::sm90 {

template <typename T, bool kPadded>
void launch_forward_tangent(const ForwardTangentParams& p, const Sizes& sizes, void* stream) {
  const TangentMaps maps = tangent_maps<T>(p, forward_tangent_shape(kPadded));
  const Plan plan = forward_tangent_plan(sizes, device::multiprocessors(), kPadded);
  device::launch("attention_forward_tangent_sm90", +attention_forward_tangent_sm90<T, kForwardTangentDim, kPadded>,
                 launch_config(plan, stream), maps, p, tangent_schedule(p.problem, sizes));
}

template <typename T>
bool try_forward_tangent(const ForwardTangentParams& p, void* stream) {
  const Sizes sizes = tangent_sizes<T>(p.problem, p.tangents);
  if (forward_tangent_refusal(sizes) != nullptr || device::architecture() != 90 || !has_tangent_maps(p)) return false;
  dispatch_bool(is_padded(p.problem),
                [&](auto with_padding) { launch_forward_tangent<T, decltype(with_padding)::value>(p, sizes, stream); });
  return true;
}

}  // namespace fastgen::attention::sm90
