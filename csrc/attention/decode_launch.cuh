// Launchers of decode, apart from launch.cuh because launch_forward, which calls them, is instantiated in other files.
#pragma once

#include "attention/combine_launch.cuh"
#include "attention/decode.cuh"
#include "attention/decode_plan.h"
#include "attention/launching.cuh"

namespace fastgen::attention {

template <typename T>
int64_t decode_workspace(const Problem& problem) {
  const Sizes sizes = sizes_of(problem, sizeof(T));
  return split_floats(sizes, decode_plan(sizes, device::multiprocessors()).slices);
}

template <typename T>
void launch_decode(ForwardParams p, void* stream) {
  const Sizes sizes = sizes_of(p.problem, sizeof(T));
  const Plan plan = decode_plan(sizes, device::multiprocessors());
  p.splits = plan.slices;
  if (p.splits > 1 && p.parts == nullptr) throw Error("attention_decode", "split keys need a workspace");
  dispatch_head_dims<kDecodeHeadDims>(plan.dims, [&]<int kKeyDim, int kValueDim>() {
    device::launch("attention_decode", +attention_decode<T, kKeyDim, kValueDim>, launch_config(plan, stream), p);
  });
  launch_combine<T, kDecodeHeadDims[length(kDecodeHeadDims) - 1].value>(p, sizes, stream);
}

}  // namespace fastgen::attention
