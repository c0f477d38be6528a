// Tile table and launch plan of attention_backward_one_tile, which takes the backward pass of problems whose scores of
// one head fit one tile. Host code, exposed by fastgen.backend.plans.
//
// Shared memory of a block, rows padded by 16 bytes:
//
//   query, grad_out   block_m rows of the head dim     block_m: queries in multiples of 16
//   key, value        block_n rows of the head dim     block_n: keys in multiples of 32
//   or, after the last use of those, P and dS: block_m rows of ``rows`` columns each
//   with the gradient of a mask: block_m rows of ``rows`` floats, the mask
#pragma once

#include "attention/plan.h"

namespace fastgen::attention {

struct OneTileShape {
  Dims dims;             // compiled head dims, equal
  int rows;              // maximum of queries and of keys
  int blocks;            // per multiprocessor, as far as registers are concerned: the launch bounds
  int blocks_with_mask;  // the same with the gradient of a mask; 0: attention_mask_gradient computes that
};

// In order of preference. A problem takes the first entry that holds it.
// clang-format off
//                                         dims      rows blocks, with mask   regs: plain, masked, with mask (the more
//                                                                            of sm_80 and sm_90a)
constexpr OneTileShape kOneTile16[] = {{{ 32,  32},  64,  4,      2},      // 128, 128, 186
                                       {{ 64,  64},  64,  3,      2},      // 168, 164, 218
                                       {{128, 128},  64,  2,      0},      // 255, 239, no registers for the bias
                                       {{ 64,  64},  96,  1,      0}};     // 235, 209, no room for the bias
constexpr OneTileShape kOneTile32[] = {{{ 32,  32},  64,  2,      1},      // no plain; 178, 210 on sm_80
                                       {{ 64,  64},  64,  2,      1}};     // no plain; 210, 238 on sm_80
// clang-format on

constexpr int kOneTileChunk = 32;  // keys whose scores are computed at a time

// Of a row of the bias: 16 lanes read 8 bytes each of 4 rows, without bank conflicts.
FASTGEN_HOST_DEVICE constexpr int one_tile_bias_columns(int rows) { return rows + 8; }

constexpr int one_tile_bytes(const OneTileShape& shape, int element_size, int block_m, int block_n, bool with_mask) {
  const int row = row_bytes(shape.dims.key, element_size), score_row = row_bytes(shape.rows, element_size);
  const int bias = with_mask ? block_m * one_tile_bias_columns(shape.rows) * static_cast<int>(sizeof(float)) : 0;
  return 2 * block_m * row + larger(2 * block_n * row, 2 * block_m * score_row) + bias;
}

template <int kCount>
constexpr bool all_one_tiles_fit(const OneTileShape (&table)[kCount], int element_size) {
  for (const OneTileShape& shape : table) {
    if (shape.dims.key != shape.dims.value || shape.rows % kOneTileChunk != 0) return false;
    const bool with_mask = shape.blocks_with_mask > 0;
    if (one_tile_bytes(shape, element_size, shape.rows, shape.rows, with_mask) > kSharedLimit) return false;
  }
  return true;
}
static_assert(all_one_tiles_fit(kOneTile16, 2) && all_one_tiles_fit(kOneTile32, 4),
              "key and value share code, chunks fill the tile, and the shared memory fits every GPU from sm_80 on");

// The index of a problem's entry; -1 if there is none.
template <int kCount>
constexpr int find_one_tile(const OneTileShape (&table)[kCount], const Sizes& sizes) {
  const Dims dims = {sizes.key_dim, sizes.value_dim};
  for (int i = 0; i < kCount; ++i) {
    if (holds(table[i].dims, dims) && sizes.queries <= table[i].rows && sizes.keys <= table[i].rows) return i;
  }
  return -1;
}

struct OneTilePlan {
  int entry = -1;  // of the table; -1: the problem takes attention_backward_query and attention_backward_key_value
  Plan plan = {};
};

// Not taken are grouped heads, where several blocks would add to the same gradient, packed sequences, whose lengths are
// in device memory, and a softcap (``capped``), because there are no registers for its derivatives.
constexpr OneTilePlan one_tile_plan(const Sizes& sizes, bool capped) {
  if (capped || sizes.heads != sizes.key_heads || sizes.sequences > 0 || sizes.queries == 0 || sizes.keys == 0) {
    return {};
  }
  const bool wide = sizes.element_size == 4;
  const int entry = wide ? find_one_tile(kOneTile32, sizes) : find_one_tile(kOneTile16, sizes);
  if (entry < 0) return {};
  const OneTileShape& shape = wide ? kOneTile32[entry] : kOneTile16[entry];
  const int query_tiles = static_cast<int>(ceil_div(sizes.queries, kFragmentRows));
  const int key_chunks = static_cast<int>(ceil_div(sizes.keys, kOneTileChunk));
  // A warp has 16 queries, then 32 keys of dK or of dV.
  const int warps = larger(query_tiles, 2 * key_chunks);
  const int block_m = query_tiles * kFragmentRows, block_n = key_chunks * kOneTileChunk;
  const int bytes = one_tile_bytes(shape, sizes.element_size, block_m, block_n, false);
  return {entry, {shape.dims, warps, block_m, block_n, 1, sizes.batch * sizes.heads, 1, bytes}};
}

// The same with the gradient of a mask that is broadcast over no queries and no keys: a block owns one (batch, head) of
// the mask and iterates over those that it is broadcast to. If there are few, ``slices`` blocks share one, as many as
// run at the same time, and attention_sum_parts adds their partial sums in order. ``extras``: a softcap or dropout,
// which this kernel does not have.
constexpr OneTilePlan one_tile_mask_plan(const Sizes& sizes, bool extras, const int (&mask)[4], int multiprocessors) {
  OneTilePlan found = one_tile_plan(sizes, extras);
  if (found.entry < 0 || mask[2] != sizes.queries || mask[3] != sizes.keys) return {};
  const OneTileShape& shape = sizes.element_size == 4 ? kOneTile32[found.entry] : kOneTile16[found.entry];
  if (shape.blocks_with_mask == 0) return {};
  Plan& plan = found.plan;
  plan.shared_bytes = one_tile_bytes(shape, sizes.element_size, plan.owned, plan.iterated, true);
  plan.blocks = int64_t{mask[0]} * mask[1];
  if (plan.blocks == 0) return {};
  const int64_t each = sizes.batch * sizes.heads / plan.blocks;
  const int64_t wanted = int64_t{multiprocessors} * shape.blocks_with_mask / plan.blocks;
  const int64_t slices = wanted < each ? wanted : each;
  plan.slices = static_cast<int>(slices < 1 ? 1 : slices);
  return found;
}

}  // namespace fastgen::attention
