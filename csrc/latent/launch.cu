// CUDA implementation of latent/launch.h.
#include "latent/launch.h"

#include "common/dispatch.h"
#include "device/launch.cuh"
#include "latent/launch.cuh"
#include "latent/plan.h"
#include "latent/sum_parts.cuh"

namespace fastgen::latent {

int multiprocessors() { return device::multiprocessors(); }

void launch_forward(const ForwardParams& p, DType dtype, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  Plan plan = {};
  dispatch_dtype(dtype, [&](auto type) { plan = forward<typename decltype(type)::type>(p, cuda_stream); });
  if (p.kl != nullptr && plan.splits > 1) {
    const dim3 grid(device::grid_size(ceil_div(p.rows, kThreads), "latent"));
    device::launch("latent_sum_parts", +latent_sum_parts, {grid, dim3(kThreads), 0, cuda_stream},
                   static_cast<const float*>(p.partial), p.kl, p.rows, plan.splits);
  }
}

void launch_backward(const BackwardParams& params, DType dtype, void* stream) {
  dispatch_dtype(
      dtype, [&](auto type) { backward<typename decltype(type)::type>(params, static_cast<cudaStream_t>(stream)); });
}

}  // namespace fastgen::latent
