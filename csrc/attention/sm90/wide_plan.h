// Tiles and launch plan of the forward kernel of head dim 512 for sm_90a, and the problems that it serves. Host code.
//
// A block is three warpgroups: a producer, of which one thread copies tiles, and two consumers that share 64 queries
// and have half of the columns of the output each.
#pragma once

#include "attention/sm90/plan.h"

namespace fastgen::attention::sm90 {

constexpr int kWideDim = 512, kWideKeys = 64;  // of a tile: the stages of K and V are one each
constexpr int kWideWeightBytes = panel_bytes(kGroupRows),
              kWideFactorBytes = kGroupRows * static_cast<int>(sizeof(float));
constexpr int kWideBytes =
    tile_bytes(kGroupRows, kWideDim) + 2 * tile_bytes(kWideKeys, kWideDim) + kWideWeightBytes + kWideFactorBytes;
static_assert(kWideBytes + kMbarrierBytes <= kSharedLimit90, "the tiles fit sm_90");
static_assert(kWideForward.owned == kGroupRows, "as many splits as the workspace has parts: wide_forward_plan");

// Why the problem is not served, or null.
constexpr const char* wide_refusal(const Sizes& sizes) {
  if (sizes.element_size != 2) return "float32";
  if (!sizes.plain) return "a mask, dropout, softcap or packed sequences";
  if (larger(sizes.key_dim, sizes.value_dim) > kWideDim || smaller(sizes.key_dim, sizes.value_dim) <= kWideDim - 64) {
    return "head dims: key and value both in 456 ... 512";
  }
  if (sizes.queries <= kFragmentRows || sizes.keys == 0) return "few queries, or no keys";
  return nullptr;
}

constexpr Plan wide_forward_plan90(const Sizes& sizes, const Gpu& gpu) {
  const int64_t tiles = sizes.batch * sizes.heads * ceil_div(sizes.queries, kGroupRows);
  Plan plan = {{kWideDim, kWideDim}, kThreads / 32, kGroupRows, kWideKeys, 1, 0, 1, 0};
  plan.splits = attention::wide_forward_plan(sizes, gpu).splits;
  plan.blocks = tiles < gpu.multiprocessors ? tiles : gpu.multiprocessors;                      // for each split
  plan.tiles_per_block = static_cast<int>(ceil_div(tiles, plan.blocks < 1 ? 1 : plan.blocks));  // at most
  plan.shared_bytes = kWideBytes, plan.stages = 1;
  return plan;
}

}  // namespace fastgen::attention::sm90
