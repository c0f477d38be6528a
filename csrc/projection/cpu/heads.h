// Epilogue of a projection to heads: RMS norm (QK-norm), then rotary embedding (RoPE), and its backward, one pass over
// memory each. Formulas: fastgen/reference.py, rms_norm and rotary.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastgen::cpu {

constexpr int64_t kWidestHead = 1024;

// (batch, heads, tokens, dim) with a contiguous last dim. Strides in elements.
struct Heads {
  void* data;
  int64_t batch, head, token;
};

struct HeadsParams {
  int64_t batch, heads, tokens, dim;
  Heads input, grad, output;  // backward: grad is the gradient of the epilogue's output, output that of its input
  const float* norm;          // (dim,), may be null
  const float *cos, *sin;     // (1 | batch, tokens, half), contiguous; may be null
  int64_t table_batch, half;
  bool interleaved;
  float eps;
  float* grad_norm;  // (dim,), with grad and norm
};

void heads_epilogue(const HeadsParams& params, DType dtype);
void heads_epilogue_backward(const HeadsParams& params, DType dtype);

}  // namespace fastgen::cpu
