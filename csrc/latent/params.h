// Kernel parameters. Matrices are (rows, cols) with a contiguous last dim.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastgen::latent {

// A matrix, read in place; row_stride in elements, 0 if broadcast over the batch. Null data: absent.
struct Input {
  const void* data = nullptr;
  int64_t row_stride = 0;
};

struct Noise {
  const int64_t* seeds = nullptr;  // (rows / rows_per_seed,)
  int64_t rows_per_seed = 1;
};

struct ForwardParams {
  Input mu, logvar, prior_mu, prior_logvar;
  void* z = nullptr;         // (rows, cols), contiguous
  float* kl = nullptr;       // (rows,), null without KL
  float* partial = nullptr;  // (rows, splits), if a row is split among blocks
  Noise noise;
  int64_t rows = 0, cols = 0;
};

struct BackwardParams {
  Input grad_z;                    // optional
  const float* grad_kl = nullptr;  // (rows,), optional
  int64_t grad_kl_stride = 1;
  Input mu, logvar, prior_mu, prior_logvar;
  void *grad_mu = nullptr, *grad_logvar = nullptr;              // (rows, cols), contiguous
  void *grad_prior_mu = nullptr, *grad_prior_logvar = nullptr;  // null if that prior is absent
  Noise noise;
  int64_t rows = 0, cols = 0;
};

}  // namespace fastgen::latent
