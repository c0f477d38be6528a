// Launchers of one storage type.
#pragma once

#include <initializer_list>

#include "common/dispatch.h"
#include "device/launch.cuh"
#include "latent/backward.cuh"
#include "latent/forward.cuh"
#include "latent/plan.h"

namespace fastgen::latent {

// Whether rows can be accessed 16 bytes at a time.
inline bool vectorizes(const void* data, int64_t row_stride, int element_size) {
  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 && row_stride * element_size % kVectorBytes == 0;
}

inline bool vectorizes(const Input& input, int element_size) {
  return vectorizes(input.data, input.row_stride, element_size);
}

inline device::Launch launch_config(const Plan& plan, cudaStream_t stream) {
  return {dim3(device::grid_size(plan.row_blocks, "latent"), device::grid_size(plan.splits, "latent", UINT16_MAX)),
          dim3(kThreads), 0, stream};
}

// Returns the plan, with the number of partial sums of each row's KL.
template <typename T>
Plan forward(const ForwardParams& p, cudaStream_t stream) {
  const Plan plan = make_plan(p.rows, p.cols, sizeof(T), device::multiprocessors());
  const bool vector = p.cols % kChunk<T> == 0 && vectorizes(p.z, p.cols, sizeof(T)) && vectorizes(p.mu, sizeof(T)) &&
                      vectorizes(p.logvar, sizeof(T)) && vectorizes(p.prior_mu, sizeof(T)) &&
                      vectorizes(p.prior_logvar, sizeof(T));
  const bool prior = p.prior_mu.data != nullptr || p.prior_logvar.data != nullptr;
  dispatch_bool(vector, [&](auto vec) {
    dispatch_bool(prior, [&](auto pri) {
      constexpr auto kernel = latent_forward<T, decltype(vec)::value, decltype(pri)::value>;
      device::launch("latent_forward", +kernel, launch_config(plan, stream), p, plan);
    });
  });
  return plan;
}

template <typename T>
void backward(const BackwardParams& p, cudaStream_t stream) {
  const Plan plan = make_plan(p.rows, p.cols, sizeof(T), device::multiprocessors());
  bool vector = p.cols % kChunk<T> == 0;
  for (const void* out : {p.grad_mu, p.grad_logvar, p.grad_prior_mu, p.grad_prior_logvar}) {
    vector = vector && vectorizes(out, p.cols, sizeof(T));
  }
  for (const Input& input : {p.grad_z, p.mu, p.logvar, p.prior_mu, p.prior_logvar}) {
    vector = vector && vectorizes(input, sizeof(T));
  }
  const bool prior = p.prior_mu.data != nullptr || p.prior_logvar.data != nullptr;
  dispatch_bool(vector, [&](auto vec) {
    dispatch_bool(prior, [&](auto pri) {
      constexpr auto kernel = latent_backward<T, decltype(vec)::value, decltype(pri)::value>;
      device::launch("latent_backward", +kernel, launch_config(plan, stream), p, plan);
    });
  });
}

}  // namespace fastgen::latent
