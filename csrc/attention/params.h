// Kernel parameters. Tensors are (batch, heads, rows, dim) with a contiguous last dim, and are read in place.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastgen::attention {

// Strides in elements. Addresses, strides and dims are multiples of 16 bytes.
struct Operand {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};
struct Result {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

// One float per query row: (batch, heads, queries).
struct RowInput {
  const float* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};
struct RowResult {
  float* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

enum class MaskKind { kNone, kBool, kFloat32, kLikeQuery };  // kLikeQuery: the query's dtype

// (batch, heads, queries, keys); broadcast dims have stride 0.
struct Mask {
  const void* data = nullptr;
  MaskKind kind = MaskKind::kNone;
  int64_t batch = 0, head = 0, query = 0, key = 0;
};

// Kept weights are divided by 1 - p. The row index is (batch * heads + head) * queries + query.
struct Dropout {
  const int64_t* seeds = nullptr;  // null: no dropout
  int64_t rows_per_seed = 1;       // a multiple of heads * queries
  float p = 0.0f;
};

// Packed sequences: the rows of sequence s are begin[s] ... begin[s + 1] - 1 of a batch of 1, in device memory. The
// batch strides of all operands are then row strides, and a row's batch index is where its sequence begins.
struct Sequences {
  const int32_t* queries = nullptr;
  const int32_t* keys = nullptr;
  int count = 0;  // 0: a batch
};

constexpr int kUnbounded = INT32_MIN;

// Tiles of the rows of a head. Those of packed sequence s are begin[s] / tile + s and the following ones, up to the
// first of sequence s + 1: as many as it needs or one more.
FASTGEN_HOST_DEVICE constexpr int64_t tiles_of_head(int64_t rows, int tile, int sequences) {
  return sequences > 0 ? rows / tile + sequences : ceil_div(rows, tile);
}
FASTGEN_HOST_DEVICE constexpr unsigned tiles_of_head_32(int rows, int tile, int sequences) {
  const auto all = static_cast<unsigned>(rows), each = static_cast<unsigned>(tile);
  return sequences > 0 ? all / each + static_cast<unsigned>(sequences) : (all + each - 1) / each;
}

struct Problem {
  int batch = 0, heads = 0, key_heads = 0, queries = 0, keys = 0, key_dim = 0, value_dim = 0;
  Sequences sequences;
  int window_left = kUnbounded, window_right = kUnbounded;  // query i attends to keys i - left <= j <= i + right
  float scale = 1.0f;
  float softcap = 0.0f;      // 0: none; see softcap.cuh
  float inner_scale = 0.0f;  // scale / softcap
  bool exact = true;         // float32 products with float32 accuracy; false: tf32
  Mask mask;
  Dropout dropout;
};

struct ForwardParams {
  Problem problem;
  Operand query, key, value;
  Result out;
  RowResult lse;
  int tiles_per_block = 1;  // query tiles that a block processes in sequence; 1 if there is one query buffer
  int stages = 1, query_buffers = 1;
  // Of decode and wide: parts of the keys, and their workspace: sums (splits, batch, heads, queries, value_dim), then a
  // maximum and a sum of weights (splits, batch, heads, queries, 2).
  int splits = 1;
  float* parts = nullptr;
};

struct BackwardParams {
  Problem problem;
  Operand query, key, value, out, grad_out;
  Result grad_query, grad_key, grad_value;
  RowInput lse;
  RowInput grad_lse;       // optional
  float* delta = nullptr;  // workspace (batch, heads, queries), contiguous: rowsum(grad_out * out) - grad_lse
  int stages = 1;          // of each kernel: tiles.h
};

// Tangents of the arguments; null data: zero. The mask's is a float mask.
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
  int stages = 1;
};

// Gradients of <grad_out, tangent_out> + <grad_lse, tangent_lse>. ``first``: the arguments of the first backward, and
// the gradients.
struct SecondOrderParams {
  BackwardParams first;
  Tangents tangents;
  Operand tangent_out;
  RowInput tangent_lse;
  float* second_delta = nullptr;  // workspace, as first.delta: rowsum(grad_out * tangent_out)
};

// The gradient of a mask. Dims of size 1 are broadcast, and reduced over.
struct MaskGradient {
  int sizes[4] = {1, 1, 1, 1};
  void* data = nullptr;             // contiguous
  MaskKind kind = MaskKind::kNone;  // the mask's dtype
  float* parts = nullptr;           // workspace (splits, *sizes); null if splits is 1
  int splits = 1;
};

}  // namespace fastgen::attention
