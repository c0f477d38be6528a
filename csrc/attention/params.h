// What an attention kernel is told. Tensors are (batch, heads, rows, dim) with a contiguous last dim, read in place.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastgen::attention {

// Addresses, strides (in elements) and dims are whole multiples of 16 bytes.
struct Operand {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};
struct Result {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

// A float for each row of the queries, (batch, heads, queries).
struct RowInput {
  const float* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};
struct RowResult {
  float* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

enum class MaskKind { kNone, kBool, kFloat32, kLikeQuery };  // the last: of the query's dtype

// Over (batch, heads, queries, keys); a stride is 0 where the mask is broadcast.
struct Mask {
  const void* data = nullptr;
  MaskKind kind = MaskKind::kNone;
  int64_t batch = 0, head = 0, query = 0, key = 0;
};

// Weights that stay are divided by their share, 1 - p. Rows are numbered (batch * heads + head) * queries + query.
struct Dropout {
  const int64_t* seeds = nullptr;  // null: no dropout
  int64_t rows_per_seed = 1;       // whole batch entries
  float p = 0.0f;
};

struct Problem {
  int batch = 0, heads = 0, key_heads = 0, queries = 0, keys = 0, key_dim = 0, value_dim = 0;
  int window_left = -1, window_right = -1;  // query i sees keys i - left <= j <= i + right; -1: no bound
  float scale = 1.0f;
  bool exact = true;  // float32 products at float32 accuracy; otherwise in tf32
  Mask mask;
  Dropout dropout;
};

struct ForwardParams {
  Problem problem;
  Operand query, key, value;
  Result out;
  RowResult lse;
  int items = 1;  // row tiles that a block takes one after the other
};

struct BackwardParams {
  Problem problem;
  Operand query, key, value, out, grad_out;
  Result grad_query, grad_key, grad_value;
  RowInput lse;
  RowInput grad_lse;       // may be absent
  float* delta = nullptr;  // workspace (batch, heads, queries), contiguous: rowsum(grad_out * out) - grad_lse
};

// Directions in which the arguments move; without data: not at all. The mask's is a float mask.
struct Tangents {
  Operand query, key, value;
  Mask mask;
};

struct TangentParams {
  Problem problem;
  Operand query, key, value, out;
  RowInput lse;
  Tangents tangents;
  Result tangent_out;
  RowResult tangent_lse;
};

// Gradients of <grad_out, tangent_out> + <grad_lse, tangent_lse>. ``first`` has what is differentiated, and where the
// gradients go.
struct SecondOrderParams {
  BackwardParams first;
  Tangents tangents;
  Operand tangent_out;
  RowInput tangent_lse;
  float* second_delta = nullptr;  // workspace like first.delta: rowsum(grad_out * tangent_out)
};

// Whose gradient, and where it goes. A dim of the mask is broadcast where its size is 1.
struct MaskGradient {
  int sizes[4] = {1, 1, 1, 1};
  void* data = nullptr;             // contiguous
  MaskKind kind = MaskKind::kNone;  // of the mask
  float* parts = nullptr;           // workspace (splits, the mask's sizes); null where splits is 1
  int splits = 1;
};

}  // namespace fastgen::attention
