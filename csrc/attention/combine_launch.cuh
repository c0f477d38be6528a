// The launcher of attention_combine.
#pragma once

#include "attention/combine.cuh"
#include "attention/launching.cuh"

namespace fastgen::attention {

// Adds the parts of p.splits splits, if there are several. kColumns: as in the kernel.
template <typename T, int kColumns>
void launch_combine(const ForwardParams& p, const Sizes& sizes, void* stream) {
  if (p.splits == 1) return;
  const char* name = "attention_combine";
  const dim3 grid(device::grid_size(sizes.batch * sizes.heads * sizes.queries, name));
  device::launch(name, +attention_combine<T, kColumns>,
                 {grid, dim3(kCombineThreads), 0, static_cast<cudaStream_t>(stream)}, p);
}

}  // namespace fastgen::attention
