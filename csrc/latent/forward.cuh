// Reparameterization z = mu + noise * e^(logvar / 2), and the KL divergence of each row.
//
//   for each chunk of 16 bytes of the row        load mu, logvar (and the prior)
//     noise from the Philox counter of each group of four columns, in registers
//     z = mu + noise * e^(logvar / 2)            store z
//     kl += terms.h
//   epilogue: sum of kl over the team, or over the block; latent_sum_parts adds the splits in order
//
//               columns ->
//   row 0     | team 0: threads_per_row threads, one chunk each, strided |   block: 256 threads = rows_per_block teams
//   row 1     | team 1                                                   |   gridDim = (row blocks, splits of a row)
//
// Memory bound: in float32 8 bytes are read per element (mu, logvar) and 4 written (z), the minimum. A prior adds at
// most 8, less if it is broadcast.
#pragma once

#include <initializer_list>

#include "common/reduce.cuh"
#include "latent/chunk.cuh"
#include "latent/plan.h"
#include "latent/terms.h"

namespace fastgen::latent {

template <typename T, bool kVector, bool kPrior>
__global__ void __launch_bounds__(kThreads) latent_forward(ForwardParams p, Plan plan) {
  const int team = plan.threads_per_row;
  const int lane = threadIdx.x % team;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * plan.rows_per_block + threadIdx.x / team;
  float kl = 0.0f;
  if (row < p.rows) {
    const NoiseRow noise_of_row = noise_row(p.noise, row, p.cols);
    const int64_t stride = static_cast<int64_t>(team) * plan.splits * kChunk<T>;
    for (int64_t col = (static_cast<int64_t>(blockIdx.y) * team + lane) * kChunk<T>; col < p.cols; col += stride) {
      Chunk<T, kVector> mu = {}, logvar = {}, prior_mu = {}, prior_logvar = {}, z = {};
      mu.load_chunk(p.mu, row, col), logvar.load_chunk(p.logvar, row, col);
      if constexpr (kPrior)
        prior_mu.load_chunk(p.prior_mu, row, col), prior_logvar.load_chunk(p.prior_logvar, row, col);
#pragma unroll 1
      for (int64_t group = col; group < col + kChunk<T>; group += kGroup) {
        mu.load_group(p.mu, row, group, p.cols), logvar.load_group(p.logvar, row, group, p.cols);
        if constexpr (kPrior) {
          prior_mu.load_group(p.prior_mu, row, group, p.cols);
          prior_logvar.load_group(p.prior_logvar, row, group, p.cols);
        }
        float noise[kGroup];
        noise_group(noise_of_row, group, noise);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          // Columns past the end are zeros, whose term is 0.
          float term, sample;
          if constexpr (kPrior) {
            sample = forward_element(noise[i], mu[i], logvar[i], prior_mu[i], prior_logvar[i], term);
          } else {
            sample = forward_element(noise[i], mu[i], logvar[i], term);
          }
          z.set(i, sample);
          kl += term;
        }
        z.store_group(p.z, row, group, p.cols);
        for (auto* chunk : {&mu, &logvar, &prior_mu, &prior_logvar, &z}) chunk->next_group();
      }
      z.store_chunk(p.z, row, col, p.cols);
    }
  }
  if (p.kl == nullptr) return;
  kl = team == kThreads ? block_sum<kThreads>(kl) : team_sum(kl, team);
  if (lane != 0 || row >= p.rows) return;
  if (plan.splits == 1) {
    p.kl[row] = 0.5f * kl;
  } else {
    p.partial[row * plan.splits + blockIdx.y] = kl;
  }
}

}  // namespace fastgen::latent
