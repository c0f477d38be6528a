// The elementwise part of a tile of scores in the tangent and second-order passes, in one pass over memory. Formulas:
// fastgen/reference.py.
#pragma once

#include <cstdint>

namespace fastgen::cpu {

// Contiguous (rows, keys) matrices and (rows,) vectors.
struct WeightsParams {
  float* scores;       // in: S; out: Pt = P (W - w) with dropout
  float* direction;    // in: W; out: P with dropout, or dS2 with grads and without cross
  float* grads;        // may be null. in: dO V^T; out: dS
  float* cross;        // may be null. in: dO Gv^T; out: dS2
  const float* keep;   // dropout factors, may be null
  const float* lse;    // finite
  const float* delta;  // required with grads: rowsum(dO * O) - dlse
  float* row;          // out: w, the tangent of lse
  int64_t rows, keys;
};

void attention_weights(const WeightsParams& params);

}  // namespace fastgen::cpu
