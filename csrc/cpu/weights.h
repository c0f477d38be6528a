// Between the products of a tile of scores, where attention is differentiated in a direction or twice: everything that
// is done to its elements, in one pass over memory. The formulas are those of fastgen/reference.py.
#pragma once

#include <cstdint>

namespace fastgen::cpu {

// Matrices of ``rows`` x ``keys``, contiguous, and a float for each row.
struct WeightsParams {
  float* scores;       // S; becomes Pt = P (W - w), with dropout
  float* direction;    // W; becomes P with dropout, or dS2 where there are grads and no cross
  float* grads;        // dO V^T, may be null; becomes dS
  float* cross;        // dO Gv^T, may be null; becomes dS2
  const float* keep;   // dropout's factors, may be null
  const float* lse;    // finite
  const float* delta;  // with grads: rowsum(dO * O) - dlse
  float* row;          // w, the tangent of lse
  int64_t rows, keys;
};

void attention_weights(const WeightsParams& params);

}  // namespace fastgen::cpu
