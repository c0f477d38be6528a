// Launch plan of the decode kernel: which problems it serves, and into how many parts keys are split. Host code,
// exposed by fastgen.backend.plans.
#pragma once

#include "attention/decode_tiles.h"
#include "attention/plan.h"

namespace fastgen::attention {

constexpr int kDecodeQueries = 16;                 // per head, at most
constexpr int kDecodeKeys = 64;                    // at least
constexpr int kDecodeBlocksPerMultiprocessor = 2;  // so that one computes while the other's loads are in flight
constexpr int kSplitKeys = 128;                    // of a split, at least

// Dropout and packed sequences take the forward kernel.
constexpr bool is_decode(const Sizes& sizes, bool has_dropout) {
  const Dims dims = {sizes.key_dim, sizes.value_dim};
  return sizes.queries > 0 && sizes.queries <= kDecodeQueries && sizes.keys >= kDecodeKeys && !has_dropout &&
         sizes.sequences == 0 && find_head_dims(kDecodeHeadDims, dims) >= 0;
}

inline bool is_decode(const Problem& p) {
  // Plans of either element size have the same head dims.
  return is_decode(sizes_of(p, 2), p.dropout.seeds != nullptr);
}

// The smallest number of splits whose blocks fill their last wave almost as well as that of the best number does; 1 if
// there are enough blocks without. Each split adds a row of sums to write and to read for each query.
constexpr int decode_splits(int64_t blocks, int64_t keys, int multiprocessors) {
  const int64_t wave = int64_t{multiprocessors} * kDecodeBlocksPerMultiprocessor;
  const int64_t by_keys = keys / kSplitKeys, most = by_keys < kMaxSplits ? by_keys : kMaxSplits;
  if (blocks >= wave || most <= 1) return 1;
  const auto filled = [&](int64_t splits) {  // in 1 / 1024
    return 1024 * blocks * splits / (ceil_div(blocks * splits, wave) * wave);
  };
  int64_t best = 0;
  for (int64_t splits = 1; splits <= most; ++splits) best = filled(splits) > best ? filled(splits) : best;
  int64_t splits = 1;
  while (20 * filled(splits) < 19 * best) ++splits;
  return static_cast<int>(splits);
}

// gridDim = (row tiles of all key heads, splits). ``owned``: rows of a tile; ``iterated``: keys of a warp's tile.
constexpr Plan decode_plan(const Sizes& sizes, int multiprocessors) {
  const Dims dims = kDecodeHeadDims[find_head_dims(kDecodeHeadDims, {sizes.key_dim, sizes.value_dim})];
  const DecodeShape shape = decode_shape(dims, sizes.element_size);
  const int64_t rows = sizes.heads / sizes.key_heads * sizes.queries;
  const int64_t blocks = sizes.batch * sizes.key_heads * ceil_div(rows, kDecodeRows);
  const int splits = decode_splits(blocks, sizes.keys, multiprocessors);
  const int64_t tiles = ceil_div(ceil_div(sizes.keys, shape.keys), splits);
  const int warps = static_cast<int>(tiles < shape.warps ? tiles : shape.warps);
  Plan plan = {};
  plan.dims = dims, plan.warps = warps, plan.owned = kDecodeRows, plan.iterated = shape.keys, plan.tiles_per_block = 1;
  plan.blocks = blocks, plan.slices = splits, plan.shared_bytes = decode_bytes(dims, sizes.element_size, warps);
  return plan;
}

}  // namespace fastgen::attention
