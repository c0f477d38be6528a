// Tiles and launch plans of the tangent kernels for sm_90a, and the problems that they serve. Host code.
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

// Of output and tangent in one sweep, which has sums of both: of head dim 64 alone.
constexpr int kForwardTangentDim = 64;
FASTGEN_HOST_DEVICE constexpr BackwardShape forward_tangent_shape(bool padded) {
  return {BLOCK_M, padded ? 64 : 96, 3, 3};
}

// Q and its tangent, and the stages of K, V and their tangents.
constexpr int tangent_bytes90(int head_dim, const BackwardShape& shape) {
  return 2 * tile_bytes(shape.owned, head_dim) + 4 * shape.key_stages * tile_bytes(shape.iterated, head_dim);
}
constexpr bool tangent_fits(int head_dim, const BackwardShape& shape) {
  return tangent_bytes90(head_dim, shape) + kMbarrierBytes <= kSharedLimit90;
}
static_assert(tangent_fits(64, tangent_shape90(64, false)) && tangent_fits(64, tangent_shape90(64, true)) &&
                  tangent_fits(128, tangent_shape90(128, false)) && tangent_fits(128, tangent_shape90(128, true)) &&
                  tangent_fits(kForwardTangentDim, forward_tangent_shape(false)) &&
                  tangent_fits(kForwardTangentDim, forward_tangent_shape(true)),
              "the tiles fit sm_90");

// Why the problem is not served, or null: as the backward pass. ``plain`` may be true of problems with a boolean mask
// of keys too.
constexpr const char* tangent_refusal(const Sizes& sizes) { return backward_refusal(sizes); }

constexpr const char* forward_tangent_refusal(const Sizes& sizes) {
  if (const char* reason = tangent_refusal(sizes); reason != nullptr) return reason;
  return backward_head_dim_of(sizes) == kForwardTangentDim ? nullptr : "head dims: key and value both in 40 ... 64";
}

constexpr Plan tangent_plan_of(const Sizes& sizes, int multiprocessors, const BackwardShape& shape) {
  const int dim = backward_head_dim_of(sizes);
  const int64_t tiles = sizes.batch * sizes.heads * ceil_div(sizes.queries, shape.owned);
  Plan plan = {{dim, dim}, kThreads / 32, shape.owned, shape.iterated, 1, 0, 1, 0};
  plan.blocks = tiles < multiprocessors ? tiles : multiprocessors;
  plan.tiles_per_block = static_cast<int>(ceil_div(tiles, plan.blocks < 1 ? 1 : plan.blocks));  // at most
  plan.shared_bytes = tangent_bytes90(dim, shape), plan.stages = shape.key_stages;
  return plan;
}
constexpr Plan tangent_plan90(const Sizes& sizes, int multiprocessors, bool padded = false) {
  return tangent_plan_of(sizes, multiprocessors, tangent_shape90(backward_head_dim_of(sizes), padded));
}
constexpr Plan forward_tangent_plan(const Sizes& sizes, int multiprocessors, bool padded = false) {
  return tangent_plan_of(sizes, multiprocessors, forward_tangent_shape(padded));
}

}  // namespace fastgen::attention::sm90
