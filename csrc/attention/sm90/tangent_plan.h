// Tiles and launch plan of the tangent kernel for sm_90a, and the problems that it serves. Host code.
//
// Blocks as in plan.h, of two consumers with 64 queries each.
#pragma once

#include "attention/sm90/backward_plan.h"

namespace fastgen::attention::sm90 {

// A consumer's thread holds keys / 2 scores, as many tangents of them, head_dim / 2 sums, and both weights of the tile
// before in keys / 2 registers. With padding its bits take registers too.
FASTGEN_HOST_DEVICE constexpr BackwardShape tangent_shape90(int head_dim, bool padded) {
  const int keys = padded ? 64 : head_dim <= 64 ? 96 : 80, stages = head_dim <= 64 ? 3 : 2;
  return {BLOCK_M, keys, stages, stages};
}

// Q and its tangent, and the stages of K, V and their tangents.
constexpr int tangent_bytes90(int head_dim, bool padded) {
  const BackwardShape shape = tangent_shape90(head_dim, padded);
  return 2 * tile_bytes(shape.owned, head_dim) + 4 * shape.key_stages * tile_bytes(shape.iterated, head_dim);
}
constexpr bool tangent_fits(int head_dim) {
  return tangent_bytes90(head_dim, false) + kMbarrierBytes <= kSharedLimit90 &&
         tangent_bytes90(head_dim, true) + kMbarrierBytes <= kSharedLimit90;
}
static_assert(tangent_fits(64) && tangent_fits(128), "the tiles fit sm_90");

// Why the problem is not served, or null: as the backward pass. ``plain`` may be true of problems with a boolean mask
// of keys too.
constexpr const char* tangent_refusal(const Sizes& sizes) { return backward_refusal(sizes); }

constexpr Plan tangent_plan90(const Sizes& sizes, int multiprocessors, bool padded = false) {
  const int dim = backward_head_dim_of(sizes);
  const BackwardShape shape = tangent_shape90(dim, padded);
  const int64_t tiles = sizes.batch * sizes.heads * ceil_div(sizes.queries, shape.owned);
  Plan plan = {{dim, dim}, kThreads / 32, shape.owned, shape.iterated, 1, 0, 1, 0};
  plan.blocks = tiles < multiprocessors ? tiles : multiprocessors;
  plan.tiles_per_block = static_cast<int>(ceil_div(tiles, plan.blocks < 1 ? 1 : plan.blocks));  // at most
  plan.shared_bytes = tangent_bytes90(dim, padded), plan.stages = shape.key_stages;
  return plan;
}

}  // namespace fastgen::attention::sm90
