// A tile of scores between the products of attention, forwards and backwards, in one pass over memory each. The
// formulas are those of fastgen/reference.py.
#pragma once

#include <cstdint>

namespace fastgen::cpu {

// Matrices of ``rows`` x ``keys``, contiguous, and a float for each row.
struct SoftmaxParams {
  float* scores;       // S; becomes the weights, with dropout
  float* grads;        // backwards: dO V^T; becomes dS
  const float* keep;   // dropout's factors, may be null
  float* lse;          // written forwards, read backwards; -inf for a row that sees nothing
  const float* delta;  // backwards: rowsum(dO * O) - dlse
  int64_t rows, keys;
};

void attention_softmax(const SoftmaxParams& params);
void attention_softmax_backward(const SoftmaxParams& params);

}  // namespace fastgen::cpu
