// Launch plan of attention_backward_one_head, which takes the backward pass of heads whose keys fit one block. Host
// code, exposed by fastgen.backend.plans.
//
// Shared memory of a block, rows padded by 16 bytes:
//
//   query, grad_out   2 stages of 32 rows of the head dim
//   key, value        block_n rows of the head dim          block_n: keys in multiples of 32
//   dS^T              block_n rows of 32 columns
#pragma once

#include "attention/plan.h"

namespace fastgen::attention {

constexpr Dims kOneHeadDims = {64, 64};  // wider ones have no registers for dK and dV of 32 keys, 255 are used
constexpr int kOneHeadWarps = 8;
constexpr int kOneHeadKeys = 32;     // of a warp
constexpr int kOneHeadQueries = 32;  // of an iterated tile
constexpr int kOneHeadMaxKeys = kOneHeadWarps * kOneHeadKeys;
constexpr int kOneHeadMinKeys = kOneHeadMaxKeys - 2 * kOneHeadKeys + 1;  // at least seven warps have keys

constexpr int one_head_bytes(int element_size, int block_n) {
  const int row = row_bytes(kOneHeadDims.key, element_size);
  return 2 * 2 * kOneHeadQueries * row + block_n * (2 * row + row_bytes(kOneHeadQueries, element_size));
}
static_assert(one_head_bytes(2, kOneHeadMaxKeys) <= kSharedLimit80, "all keys fit sm_80 and sm_90");

struct OneHeadPlan {
  bool taken = false;  // else the problem takes attention_backward_query and attention_backward_key_value
  Plan plan = {};
};

// Not taken are masks, dropout, softcaps and packed sequences, for which there are no registers, grouped heads, where
// several blocks would add to the same gradient, and fewer heads than multiprocessors, because a block has a head.
constexpr OneHeadPlan one_head_plan(const Sizes& sizes, const Gpu& gpu) {
  const Dims dims = {sizes.key_dim, sizes.value_dim};
  const int64_t blocks = sizes.batch * sizes.heads;
  if (sizes.element_size != 2 || !sizes.plain || sizes.heads != sizes.key_heads || sizes.queries == 0) return {};
  if (!holds(kOneHeadDims, dims) || widest(dims) <= 32) return {};  // narrow heads would be padded
  if (sizes.keys < kOneHeadMinKeys || sizes.keys > kOneHeadMaxKeys || blocks < gpu.multiprocessors) return {};
  const int block_n = static_cast<int>(ceil_div(sizes.keys, kOneHeadKeys)) * kOneHeadKeys;
  const int bytes = one_head_bytes(sizes.element_size, block_n);
  if (bytes > gpu.shared_limit) return {};
  return {true, {kOneHeadDims, kOneHeadWarps, block_n, kOneHeadQueries, 1, blocks, 1, bytes}};
}

}  // namespace fastgen::attention
