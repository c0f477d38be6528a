// Gradients of the fused float32 attention on the CPU; see forward.h.
#pragma once

#include "attention/cpu/problem.h"

namespace fastgen::cpu {

struct BackwardParams {
  Problem problem;
  Operand out, grad_out;                    // (B, H, N, Dv)
  Operand lse, grad_lse;                    // (B, H, N); grad_lse may be absent
  Result grad_query, grad_key, grad_value;  // like query, key, value
  // Of a float mask (B|1, H|1, N, M), zeros before the call; may be null. Strides of 0 where the mask is broadcast.
  float* grad_mask = nullptr;
  int64_t grad_mask_strides[2] = {};
};

// Requires keys > 0. Results do not depend on the number of threads.
void attention_backward(const BackwardParams& params);

}  // namespace fastgen::cpu
