// Heads, normalised and turned, and the gradients of that: one pass over memory. The formulas are those of
// fastgen/reference.py, rms_norm and rotary.
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
  Heads input, grad, output;  // the gradient of what is put out, where that is wanted, and the output, or its gradient
  const float* norm;          // (dim,), may be null
  const float *cos, *sin;     // (1 | batch, tokens, half), contiguous; may be null
  int64_t table_batch, half;
  bool interleaved;
  float eps;
  float* grad_norm;  // (dim,), with grad and norm
};

void finish_heads(const HeadsParams& params, DType dtype);
void finish_heads_backward(const HeadsParams& params, DType dtype);

}  // namespace fastgen::cpu
