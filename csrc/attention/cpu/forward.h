// Fused float32 attention on the CPU, for any head dims, masks and dropout.
#pragma once

#include "attention/cpu/problem.h"

namespace fastgen::cpu {

struct ForwardParams {
  Problem problem;
  Result out, lse;  // (B, H, N, Dv), (B, H, N)
};

// Requires keys > 0. Results do not depend on the number of threads.
void attention_forward(const ForwardParams& params);

}  // namespace fastgen::cpu
