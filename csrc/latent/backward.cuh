// Gradients of mu and logvar, and of the prior. The noise is regenerated from the seed.
//
//   for each chunk of 16 bytes of the row        load grad_z, logvar, mu (and the prior)
//     noise from the Philox counter of each group of four columns, in registers
//     gradients, terms.h                         store grad_mu, grad_logvar (and the prior's)
//
// Teams and blocks as in forward.cuh. Memory bound: in float32 12 bytes are read per element (grad_z, mu, logvar) and 8
// written, the minimum. Without grad_kl mu is not read; without grad_z the noise is not generated.
#pragma once

#include "latent/chunk.cuh"
#include "latent/plan.h"
#include "latent/terms.h"

namespace fastgen::latent {

template <typename T, bool kVector, bool kPrior>
__global__ void __launch_bounds__(kThreads) latent_backward(BackwardParams p, Plan plan) {
  const int team = plan.threads_per_row;
  const int lane = threadIdx.x % team;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * plan.rows_per_block + threadIdx.x / team;
  if (row >= p.rows) return;
  const NoiseRow noise_of_row = noise_row(p.noise, row, p.cols);
  const float grad_kl = p.grad_kl == nullptr ? 0.0f : p.grad_kl[row * p.grad_kl_stride];
  const int64_t stride = static_cast<int64_t>(team) * plan.splits * kChunk<T>;
  for (int64_t col = (static_cast<int64_t>(blockIdx.y) * team + lane) * kChunk<T>; col < p.cols; col += stride) {
    const Chunk<T> logvar = load_chunk<T, kVector>(p.logvar, row, col, p.cols);
    const Chunk<T> grad_z = load_chunk<T, kVector>(p.grad_z, row, col, p.cols);
    Chunk<T> mu = {}, prior_mu, prior_logvar, grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar;
    if (p.grad_kl != nullptr) mu = load_chunk<T, kVector>(p.mu, row, col, p.cols);
    if constexpr (kPrior) {
      prior_mu = load_chunk<T, kVector>(p.prior_mu, row, col, p.cols);
      prior_logvar = load_chunk<T, kVector>(p.prior_logvar, row, col, p.cols);
    }
#pragma unroll
    for (int group = 0; group < kChunk<T>; group += kGroup) {
      float noise[kGroup] = {};
      if (p.grad_z.data != nullptr) noise_group(noise_of_row, col + group, noise);
#pragma unroll
      for (int i = group; i < group + kGroup; ++i) {
        Gradients g;
        if constexpr (kPrior) {
          g = gradients(grad_z[i], grad_kl, noise[i - group], mu[i], logvar[i], prior_mu[i], prior_logvar[i]);
          grad_prior_mu.set(i, g.prior_mu);
          grad_prior_logvar.set(i, g.prior_logvar);
        } else {
          g = gradients(grad_z[i], grad_kl, noise[i - group], mu[i], logvar[i]);
        }
        grad_mu.set(i, g.mu);
        grad_logvar.set(i, g.logvar);
      }
    }
    store_chunk<T, kVector>(p.grad_mu, row, col, p.cols, grad_mu);
    store_chunk<T, kVector>(p.grad_logvar, row, col, p.cols, grad_logvar);
    if constexpr (kPrior) {
      if (p.grad_prior_mu != nullptr) store_chunk<T, kVector>(p.grad_prior_mu, row, col, p.cols, grad_prior_mu);
      if (p.grad_prior_logvar != nullptr) {
        store_chunk<T, kVector>(p.grad_prior_logvar, row, col, p.cols, grad_prior_logvar);
      }
    }
  }
}

}  // namespace fastgen::latent
