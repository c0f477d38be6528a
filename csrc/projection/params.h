// Kernel parameters. Matrices are (tokens, channels), read and written in place.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastgen::projection {

constexpr int kMostParts = 4;

// Heads of ``dim`` channels each; ``first`` is the part's first channel in the matrix. Strides in elements.
struct Part {
  void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;
  int first = 0, dim = 0;
};

// Channels-last (channel == 1) or channels-first (every token stride is 1). Addresses, the contiguous dim and the other
// strides are multiples of 16 bytes.
struct Matrix {
  Part parts[kMostParts];
  int count = 0, channels = 0;
  int64_t channel = 1;
};

// Tokens are numbered per batch entry, or across the batch, whose size is then 1.
struct Tokens {
  int batch = 0, count = 0;
  int period = 1;  // tokens per sequence, if numbered across the batch
};

struct Vector {  // (batch, channels); stride 0 where broadcast
  const void* data = nullptr;
  int64_t batch = 0, channel = 0;
};

// Epilogue of a projection to heads: RMS norm (QK-norm) of the first ``norm_count`` parts, then rotary embedding (RoPE)
// of the first ``rotated``. ``kept``, if it has parts, receives the heads before the norm.
struct HeadEpilogue {
  const void* norms[kMostParts] = {};
  int norm_count = 0, rotated = 0;
  float eps = 0.0f;
  const float *cos = nullptr, *sin = nullptr;  // (1 | sequences, period, half), contiguous
  int64_t table_batch = 0;
  int half = 0;
  bool interleaved = false;
  Matrix kept;
};

// A range of output columns that tiles do not cross, with at most ``per_tile`` columns in a tile.
struct Band {
  int first = 0, columns = 0, per_tile = 0;
};

// out = residual + gate * (x weight^T + bias), or with weight instead of weight^T.
struct ProjectParams {
  Tokens tokens;
  Matrix x, out;
  const void* weight = nullptr;  // (out.channels, x.channels), or transposed
  int64_t weight_row = 0;        // row stride
  bool inputs_rows = false;      // weight is (x.channels, out.channels)
  const void* bias = nullptr;    // optional, as the following
  Vector gate;
  Matrix residual;
  HeadEpilogue epilogue;
  Band bands[kMostParts];
  int band_count = 0;
  bool exact = true;  // float32 products with float32 accuracy; false: tf32
};

// Split-K over tokens: parts[split] = grad^T x and bias_parts[split] = column sums of grad, over the split's tokens.
struct WeightGradientParams {
  Tokens tokens;
  Matrix grad, x;
  float* parts = nullptr;       // (splits, grad.channels, x.channels)
  float* bias_parts = nullptr;  // (splits, grad.channels), optional
  int64_t tiles = 0;            // of BLOCK_K tokens, per split
  int splits = 1;
  bool exact = true;
};

// Reduces the parts: grad_weight = gate * sum of parts, and the gradient of the gate for each row.
struct ReduceParams {
  const float *parts = nullptr, *bias_parts = nullptr;
  int splits = 1, rows = 0, columns = 0;
  Vector gate;  // optional; broadcast over the batch
  const void *weight = nullptr, *bias = nullptr;
  int64_t weight_row = 0;
  void *grad_weight = nullptr, *grad_bias = nullptr;  // grad_bias is optional
  float* grad_gate = nullptr;                         // (rows,), with a gate
};

// Backward of the epilogue: the gradient of the heads before QK-norm and RoPE. One part.
struct HeadBackwardParams {
  Tokens tokens;
  Matrix grad, kept, out;
  const void* norm = nullptr;   // optional
  HeadEpilogue epilogue;        // eps and tables
  float* norm_parts = nullptr;  // (blocks, dim)
};

}  // namespace fastgen::projection
