// The tangent of attention and its gradient (formulas: fastgen/reference.py), fused, float32.
#pragma once

#include "attention/cpu/problem.h"

namespace fastgen::cpu {

struct SecondOrderParams {
  Problem problem;
  Operand tangent_query, tangent_key, tangent_value;  // like query, key, value; absent ones are zero
  Mask tangent_mask;                                  // a float mask
  Operand out, lse;                                   // (B, H, N, Dv), (B, H, N)
  Result tangent_out, tangent_lse;

  // Of the second order alone.
  Operand grad_out, grad_lse;  // grad_lse may be absent
  Result grad_query, grad_key, grad_value;
};

// O' and l'.
void attention_tangent(const SecondOrderParams& params);

// The same, and the gradients of query, key and value. Results do not depend on the number of threads.
void attention_second_order(const SecondOrderParams& params);

}  // namespace fastgen::cpu
