// Launchers of decode, apart from launch.cuh because launch_forward, which calls them, is instantiated in other files.
#pragma once

#include "attention/decode.cuh"
#include "attention/decode_combine.cuh"
#include "attention/launch.cuh"

namespace fastgen::attention {

template <typename T>
int64_t decode_workspace(const Problem& problem) {
  const Sizes sizes = sizes_of(problem, sizeof(T));
  return decode_floats(sizes, decode_plan(sizes, device::multiprocessors()).slices);
}

template <typename T>
void launch_decode(ForwardParams p, void* stream) {
  const Sizes sizes = sizes_of(p.problem, sizeof(T));
  const Plan plan = decode_plan(sizes, device::multiprocessors());
  p.splits = plan.slices;
  if (p.splits > 1 && p.parts == nullptr) throw Error("attention_decode", "split keys need a workspace");
  const device::Launch config = launch_config(plan, stream);
  dispatch_head_dims<kDecodeHeadDims>(plan.dims, [&]<int kKeyDim, int kValueDim>() {
    dispatch_bool(sizes.plain, [&](auto plain) {
      constexpr auto kernel = attention_decode<T, kKeyDim, kValueDim, decltype(plain)::value>;
      device::launch("attention_decode", +kernel, config, p);
    });
  });
  if (p.splits > 1) {
    const dim3 grid(device::grid_size(sizes.batch * sizes.heads * sizes.queries, "attention_decode_combine"));
    device::launch("attention_decode_combine", +attention_decode_combine<T>,
                   {grid, dim3(kCombineThreads), 0, config.stream}, p);
  }
}

}  // namespace fastgen::attention
