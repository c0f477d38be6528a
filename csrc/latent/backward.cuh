// Gradients of mu and logvar, and of the prior. The noise is regenerated from the seed.
//
//   for each chunk of 16 bytes of the row        load grad_z, logvar, mu (and the prior)
//     noise from the Philox counter of each group of four columns, in registers
//     gradients, terms.h                         store grad_mu, grad_logvar (and the prior's)
//
// Teams and blocks as in forward.cuh. Memory bound: in float32 12 bytes are read per element (grad_z, mu, logvar) and 8
// written, the minimum. Without grad_kl mu is not read; without grad_z the noise is not generated.
#pragma once

#include <initializer_list>

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
    Chunk<T, kVector> grad_z = {}, mu = {}, logvar = {}, prior_mu = {}, prior_logvar = {};
    Chunk<T, kVector> grad_mu = {}, grad_logvar = {}, grad_prior_mu = {}, grad_prior_logvar = {};
    grad_z.load_chunk(p.grad_z, row, col), logvar.load_chunk(p.logvar, row, col);
    if (p.grad_kl != nullptr) mu.load_chunk(p.mu, row, col);
    if constexpr (kPrior) prior_mu.load_chunk(p.prior_mu, row, col), prior_logvar.load_chunk(p.prior_logvar, row, col);
#pragma unroll 1
    for (int64_t group = col; group < col + kChunk<T>; group += kGroup) {
      grad_z.load_group(p.grad_z, row, group, p.cols), logvar.load_group(p.logvar, row, group, p.cols);
      if (p.grad_kl != nullptr) mu.load_group(p.mu, row, group, p.cols);
      if constexpr (kPrior) {
        prior_mu.load_group(p.prior_mu, row, group, p.cols);
        prior_logvar.load_group(p.prior_logvar, row, group, p.cols);
      }
      float noise[kGroup] = {};
      if (p.grad_z.data != nullptr) noise_group(noise_of_row, group, noise);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        Gradients g;
        if constexpr (kPrior) {
          g = gradients(grad_z[i], grad_kl, noise[i], mu[i], logvar[i], prior_mu[i], prior_logvar[i]);
          grad_prior_mu.set(i, g.prior_mu), grad_prior_logvar.set(i, g.prior_logvar);
        } else {
          g = gradients(grad_z[i], grad_kl, noise[i], mu[i], logvar[i]);
        }
        grad_mu.set(i, g.mu), grad_logvar.set(i, g.logvar);
      }
      grad_mu.store_group(p.grad_mu, row, group, p.cols), grad_logvar.store_group(p.grad_logvar, row, group, p.cols);
      if constexpr (kPrior) {
        if (p.grad_prior_mu != nullptr) grad_prior_mu.store_group(p.grad_prior_mu, row, group, p.cols);
        if (p.grad_prior_logvar != nullptr) grad_prior_logvar.store_group(p.grad_prior_logvar, row, group, p.cols);
      }
      for (auto* chunk : {&grad_z, &mu, &logvar, &prior_mu, &prior_logvar}) chunk->next_group();
      for (auto* chunk : {&grad_mu, &grad_logvar, &grad_prior_mu, &grad_prior_logvar}) chunk->next_group();
    }
    grad_mu.store_chunk(p.grad_mu, row, col, p.cols), grad_logvar.store_chunk(p.grad_logvar, row, col, p.cols);
    if constexpr (kPrior) {
      if (p.grad_prior_mu != nullptr) grad_prior_mu.store_chunk(p.grad_prior_mu, row, col, p.cols);
      if (p.grad_prior_logvar != nullptr) grad_prior_logvar.store_chunk(p.grad_prior_logvar, row, col, p.cols);
    }
  }
}

}  // namespace fastgen::latent
