// What a projection kernel is told. Matrices are (tokens, channels), read and written in place.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastgen::projection {

constexpr int kMostParts = 4;

// Heads of ``dim`` channels each, the first of them channel number ``first`` of the matrix. Strides in elements.
struct Part {
  void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;
  int first = 0, dim = 0;
};

// Channels side by side (channel = 1), or tokens (every token stride is 1): the contiguous ones are whole multiples of
// 16 bytes, and so are addresses and the other strides.
struct Matrix {
  Part parts[kMostParts];
  int count = 0, channels = 0;
  int64_t channel = 1;
};

// Tokens are numbered within each entry of the batch; or through the batch, which then counts as 1.
struct Tokens {
  int batch = 0, count = 0;
  int period = 1;  // tokens of a sequence, where they are numbered through the batch
};

struct Vector {  // over channels, or batch and channels; strides are 0 where it is shared
  const void* data = nullptr;
  int64_t batch = 0, channel = 0;
};

// What heads undergo before they are stored: the first ``norm_count`` parts are normalised, then the first ``rotated``
// turned. ``kept``, if it has parts, takes what they were before.
struct HeadFinish {
  const void* norms[kMostParts] = {};
  int norm_count = 0, rotated = 0;
  float eps = 0.0f;
  const float *cos = nullptr, *sin = nullptr;  // (1 | sequences, period, half), contiguous
  int64_t table_batch = 0;
  int half = 0;
  bool interleaved = false;
  Matrix kept;
};

// Columns of the output that tiles do not cross the ends of: a tile has at most ``per_tile`` of them.
struct Band {
  int first = 0, columns = 0, per_tile = 0;
};

// out = residual + gate * (x weight^T + bias), or with weight instead of weight^T.
struct ProjectParams {
  Tokens tokens;
  Matrix x, out;
  const void* weight = nullptr;  // (out.channels, x.channels), or the other way round
  int64_t weight_row = 0;        // its stride
  bool inputs_down = false;      // the other way round
  const void* bias = nullptr;    // may be absent, as what follows
  Vector gate;
  Matrix residual;
  HeadFinish finish;
  Band bands[kMostParts];
  int band_count = 0;
  bool exact = true;  // float32 products at float32 accuracy; otherwise in tf32
};

// parts[split] = grad^T x, and the sums of grad's columns, each over the split's share of the tokens.
struct WeightGradientParams {
  Tokens tokens;
  Matrix grad, x;
  float* parts = nullptr;       // (splits, grad.channels, x.channels)
  float* bias_parts = nullptr;  // (splits, grad.channels), may be absent
  int64_t steps = 0;            // of a split
  int splits = 1;
  bool exact = true;
};

// The sums of the parts, times the gate; and the gate's gradient for each row.
struct FinishParams {
  const float *parts = nullptr, *bias_parts = nullptr;
  int splits = 1, rows = 0, columns = 0;
  Vector gate;  // may be absent; the batch shares it
  const void *weight = nullptr, *bias = nullptr;
  int64_t weight_row = 0;
  void *grad_weight = nullptr, *grad_bias = nullptr;  // the second may be absent
  float* grad_gate = nullptr;                         // (rows,), where there is a gate
};

// The gradient of heads before they were normalised and turned. One part.
struct HeadBackwardParams {
  Tokens tokens;
  Matrix grad, kept, out;
  const void* norm = nullptr;   // may be absent
  HeadFinish finish;            // eps and tables
  float* norm_parts = nullptr;  // (blocks, dim)
};

}  // namespace fastgen::projection
