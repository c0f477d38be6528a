// Softmax of a tile of scores and its backward, one pass over memory each. Formulas: fastgen/reference.py.
#pragma once

#include <cstdint>

namespace fastgen::cpu {

// Contiguous (rows, keys) matrices and (rows,) vectors.
struct SoftmaxParams {
  float* scores;       // in: S; out: P with dropout
  float* grads;        // backward only. in: dO V^T; out: dS
  const float* keep;   // dropout factors, may be null
  float* lse;          // forward: output, backward: input; -inf for a fully masked row
  const float* delta;  // backward only: rowsum(dO * O) - dlse
  int64_t rows, keys;
};

void attention_softmax(const SoftmaxParams& params);
void attention_softmax_backward(const SoftmaxParams& params);

}  // namespace fastgen::cpu
