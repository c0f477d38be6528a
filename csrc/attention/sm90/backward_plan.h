// Tiles and launch plans of the backward pass for sm_90a, and the problems that it serves. Host code.
//
// Blocks as in plan.h. A block owns 128 rows, of queries or of keys, and each of its two consumers 64 of them.
#pragma once

#include "attention/sm90/plan.h"

namespace fastgen::attention::sm90 {

// Owned: the rows of a block; iterated: those of a tile that it copies in turn. Stages of the iterated operand that has
// the key dim (keys, or queries) and of the one that has the value dim (values, or dO).
struct BackwardShape {
  int owned, iterated, key_stages, value_stages;
};

// The consumers hold scores and dP of 64 owned rows, and the sums: dQ, or dK and dV.
FASTGEN_HOST_DEVICE constexpr BackwardShape backward_shape(int head_dim, bool owns_keys) {
  constexpr int kOwned = kConsumers * kGroupRows;
  if (owns_keys) return head_dim == 64 ? BackwardShape{kOwned, 128, 4, 4} : BackwardShape{kOwned, 64, 4, 4};
  return head_dim == 64 ? BackwardShape{kOwned, 128, 4, 3} : BackwardShape{kOwned, 128, 3, 2};
}

// logsumexp and delta of the iterated queries.
FASTGEN_HOST_DEVICE constexpr int row_values_bytes(int head_dim, bool owns_keys) {
  const BackwardShape shape = backward_shape(head_dim, owns_keys);
  return owns_keys ? shape.key_stages * shape.iterated * 2 * static_cast<int>(sizeof(float)) : 0;
}
constexpr int backward_bytes(int head_dim, bool owns_keys) {
  const BackwardShape shape = backward_shape(head_dim, owns_keys);
  return 2 * tile_bytes(shape.owned, head_dim) +
         (shape.key_stages + shape.value_stages) * tile_bytes(shape.iterated, head_dim) +
         row_values_bytes(head_dim, owns_keys);
}
constexpr bool backward_fits(int head_dim) {
  return backward_bytes(head_dim, true) + kMbarrierBytes <= kSharedLimit90 &&
         backward_bytes(head_dim, false) + kMbarrierBytes <= kSharedLimit90;
}
static_assert(backward_fits(64) && backward_fits(128), "the tiles fit sm_90");

// The compiled head dim of a problem; 0 if it is not served.
constexpr int backward_head_dim_of(const Sizes& sizes) {
  const int dim = larger(sizes.key_dim, sizes.value_dim), narrower = smaller(sizes.key_dim, sizes.value_dim);
  if (dim <= 64) return narrower > kNarrowest ? 64 : 0;
  return dim <= 128 && narrower > 64 ? 128 : 0;
}

// Why the problem is not served, or null. ``plain`` may be true of problems with a boolean mask of keys too.
constexpr const char* backward_refusal(const Sizes& sizes) {
  if (sizes.element_size != 2) return "float32";
  if (!sizes.plain) return "a mask of scores, dropout, softcap or packed sequences";
  if (backward_head_dim_of(sizes) == 0) return "head dims: key and value both in 40 ... 64 or 72 ... 128";
  if (sizes.queries == 0 || sizes.keys == 0) return "no queries or no keys";
  return nullptr;
}

// Owned tiles of all heads are distributed over a persistent grid.
constexpr int64_t backward_tiles(const Sizes& sizes, bool owns_keys) {
  const int owned = backward_shape(backward_head_dim_of(sizes), owns_keys).owned;
  return sizes.batch *
         (owns_keys ? sizes.key_heads * ceil_div(sizes.keys, owned) : sizes.heads * ceil_div(sizes.queries, owned));
}

constexpr Plan backward_plan(const Sizes& sizes, bool owns_keys, int multiprocessors) {
  const int dim = backward_head_dim_of(sizes);
  const BackwardShape shape = backward_shape(dim, owns_keys);
  const int64_t tiles = backward_tiles(sizes, owns_keys);
  Plan plan = {{dim, dim}, kThreads / 32, shape.owned, shape.iterated, 1, 0, 1, 0};
  plan.blocks = tiles < multiprocessors ? tiles : multiprocessors;
  plan.tiles_per_block = static_cast<int>(ceil_div(tiles, plan.blocks < 1 ? 1 : plan.blocks));  // at most
  plan.shared_bytes = backward_bytes(dim, owns_keys);
  plan.stages = smaller(shape.key_stages, shape.value_stages);
  return plan;
}

}  // namespace fastgen::attention::sm90
