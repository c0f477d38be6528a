// The schedule: which tiles there are, and how a problem is shared out among blocks. Host code, shown by fastgen._C.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>

#include "attention/params.h"
#include "common/tiling.h"

namespace fastgen::attention {

struct Dims {
  int key, value;
};

// Compiled head dims, those with fewest products first. A problem takes the first that holds it; columns beyond its own
// are zeros.
constexpr Dims kTiles[] = {{16, 16}, {16, 32},   {32, 32},   {64, 64},   {32, 128},
                           {96, 96}, {128, 128}, {192, 192}, {256, 256}, {512, 512}};
constexpr int kTileCount = static_cast<int>(std::size(kTiles));

// The same for tangents and second derivatives, whose blocks hold about twice as much.
constexpr Dims kTwiceTiles[] = {{16, 32}, {64, 64}, {32, 128}, {96, 96}, {128, 128}, {256, 256}};
constexpr int kTwiceTileCount = static_cast<int>(std::size(kTwiceTiles));

// -1: no tile is wide enough.
template <int kCount>
constexpr int find_tile(const Dims (&tiles)[kCount], int key_dim, int value_dim) {
  for (int i = 0; i < kCount; ++i) {
    if (key_dim <= tiles[i].key && value_dim <= tiles[i].value) return i;
  }
  return -1;
}

constexpr int widest(Dims dims) { return dims.key > dims.value ? dims.key : dims.value; }

// How the warps of a block share its rows, and how the other rows pass by.
struct Shape {
  int warps;      // at most; a problem with few rows takes fewer
  int fragments;  // of 16 rows, that a warp owns
  int step;       // rows that pass by at a time
  int stages;     // steps in shared memory: 2 where one is copied while the other is worked on
  int columns;    // of the output that a block sums up in registers; wider outputs are cut into slices

  constexpr int rows(int of_warps) const { return of_warps * fragments * kFragmentRows; }
};

// Keys and values pass by queries. Plain: with neither mask nor dropout, which want registers of their own.
constexpr Shape forward_shape(Dims dims, int element_size, bool plain) {
  const int wide = widest(dims);
  if (element_size == 4) {
    if (wide > 256) return {2, 1, 8, 1, plain ? 256 : 128};
    if (wide > 192) return {4, 1, 16, 1, 256};
    if (wide > 128) return {4, 1, 16, 2, 256};
    return {4, 1, plain || wide <= 32 ? 32 : 16, 2, 256};
  }
  if (wide > 256) return {4, 1, 16, 1, 256};
  if (wide > 192) return {4, 1, plain ? 32 : 16, 2, 256};
  if (wide > 128) return {4, 1, 32, 2, 256};
  if (wide > 64) return plain ? Shape{4, 2, 32, 2, 256} : Shape{4, 1, 32, 2, 256};
  return plain ? Shape{4, 2, 64, 2, 256} : Shape{4, 2, 32, 2, 256};
}

// Two tiles of queries where a block goes on to the next while the last is worked on.
constexpr int query_buffers(Dims dims, int element_size, bool plain) {
  return widest(dims) <= 64 && forward_shape(dims, element_size, plain).stages == 2 ? 2 : 1;
}

constexpr int forward_bytes(Dims dims, int element_size, bool plain, int warps) {
  const Shape shape = forward_shape(dims, element_size, plain);
  const int query = shape.rows(warps) * row_bytes(dims.key, element_size);
  const int stage = row_bytes(dims.key, element_size) + row_bytes(smaller(dims.value, shape.columns), element_size);
  return query_buffers(dims, element_size, plain) * query + shape.stages * shape.step * stage;
}

// Queries and gradients of the output pass by keys and values, or the other way round.
constexpr Shape backward_shape(Dims dims, int element_size, int columns) {
  const int wide = widest(dims);
  if (element_size == 4) {
    if (wide > 256) return {1, 1, 8, 1, columns};
    if (wide > 192) return {2, 1, 16, 1, columns};
    if (wide > 128) return {2, 1, 16, 2, columns};
    if (wide > 64) return {4, 1, 16, 2, columns};
    return {4, 1, 32, 2, columns};
  }
  if (wide > 256) return {2, 1, 16, 1, columns};
  if (wide > 192) return {4, 1, 16, 2, columns};
  if (wide > 128) return {4, 1, 32, 1, columns};
  if (wide > 64) return {4, 1, 32, 2, columns};
  return {4, 1, 64, 2, columns};
}

constexpr Shape query_shape(Dims dims, int element_size) { return backward_shape(dims, element_size, 256); }
constexpr Shape key_value_shape(Dims dims, int element_size) {
  return backward_shape(dims, element_size, widest(dims) == 192 ? 96 : 128);
}

constexpr int backward_bytes(Dims dims, int element_size, int warps) {
  const Shape shape = query_shape(dims, element_size);
  return (shape.rows(warps) + shape.stages * shape.step) *
         (row_bytes(dims.key, element_size) + row_bytes(dims.value, element_size));
}

// The mask's gradient: both tiles change from item to item.
constexpr Shape mask_shape(Dims dims, int element_size) {
  Shape shape = query_shape(dims, element_size);
  shape.stages = widest(dims) <= 64 && element_size == 2 ? 2 : 1;
  return shape;
}

constexpr int mask_bytes(Dims dims, int element_size, int warps) {
  const Shape shape = mask_shape(dims, element_size);
  return shape.stages * (shape.rows(warps) + shape.step) *
         (row_bytes(dims.key, element_size) + row_bytes(dims.value, element_size));
}

// Of one row: queries and their tangents, and where it is wanted the gradient of the output; keys and values and
// theirs.
constexpr int query_side_bytes(Dims dims, int element_size, bool with_gradient) {
  return 2 * row_bytes(dims.key, element_size) + (with_gradient ? row_bytes(dims.value, element_size) : 0);
}
constexpr int key_side_bytes(Dims dims, int element_size) {
  return 2 * (row_bytes(dims.key, element_size) + row_bytes(dims.value, element_size));
}

// Keys, values and their tangents pass by queries and theirs.
constexpr Shape tangent_shape(Dims dims, int element_size) {
  const int wide = widest(dims);
  if (element_size == 4) {
    if (wide > 128) return {2, 1, 8, 1, 128};
    if (wide > 64 && dims.key > 32) return {4, 1, 16, 1, 128};
    return {4, 1, 16, 2, 128};
  }
  if (wide > 128) return {4, 1, 16, 1, 256};
  if (dims.key > 96) return {4, 1, 32, 1, 256};
  if (wide > 32) return {4, 1, 32, 2, 256};
  return {4, 1, 64, 2, 256};
}

constexpr int tangent_bytes(Dims dims, int element_size, int warps) {
  const Shape shape = tangent_shape(dims, element_size);
  const Dims slice = {dims.key, smaller(dims.value, shape.columns)};
  return shape.rows(warps) * query_side_bytes(dims, element_size, false) +
         shape.stages * shape.step * key_side_bytes(slice, element_size);
}

// Of the second order: one side passes by the other.
constexpr Shape second_order_shape(Dims dims, int element_size) {
  const int wide = widest(dims);
  if (element_size == 4) {
    if (wide > 128) return {1, 1, 8, 1, 128};
    if (dims.key > 96) return {2, 1, 16, 1, 128};
    if (wide > 64) return {2, 1, 16, 2, 128};
    return {4, 1, wide > 32 ? 16 : 32, 2, 128};
  }
  if (wide > 128) return {2, 1, 16, 1, 128};
  if (dims.key > 96) return {4, 1, 16, 2, 128};
  return {4, 1, 32, 2, 128};
}

constexpr int second_order_bytes(Dims dims, int element_size, int warps, bool owns_queries) {
  const Shape shape = second_order_shape(dims, element_size);
  const int queries = query_side_bytes(dims, element_size, true), keys = key_side_bytes(dims, element_size);
  const int passing = shape.stages * shape.step;
  return owns_queries ? shape.rows(warps) * queries + passing * keys : shape.rows(warps) * keys + passing * queries;
}

// The mask's gradient of second order: both sides change from item to item.
constexpr Shape mask_second_order_shape(Dims dims, int element_size) {
  Shape shape = second_order_shape(dims, element_size);
  shape.stages = 1;
  return shape;
}

constexpr int mask_second_order_bytes(Dims dims, int element_size, int warps) {
  const Shape shape = mask_second_order_shape(dims, element_size);
  return shape.rows(warps) * query_side_bytes(dims, element_size, true) +
         shape.step * key_side_bytes(dims, element_size);
}

constexpr bool all_fit() {
  for (const Dims dims : kTiles) {
    for (const int size : {2, 4}) {
      if (forward_bytes(dims, size, true, forward_shape(dims, size, true).warps) > kSharedLimit ||
          forward_bytes(dims, size, false, forward_shape(dims, size, false).warps) > kSharedLimit ||
          backward_bytes(dims, size, query_shape(dims, size).warps) > kSharedLimit ||
          mask_bytes(dims, size, mask_shape(dims, size).warps) > kSharedLimit) {
        return false;
      }
    }
  }
  for (const Dims dims : kTwiceTiles) {
    for (const int size : {2, 4}) {
      const int warps = second_order_shape(dims, size).warps;
      if (tangent_bytes(dims, size, tangent_shape(dims, size).warps) > kSharedLimit ||
          second_order_bytes(dims, size, warps, true) > kSharedLimit ||
          second_order_bytes(dims, size, warps, false) > kSharedLimit ||
          mask_second_order_bytes(dims, size, warps) > kSharedLimit) {
        return false;
      }
    }
  }
  return true;
}
static_assert(all_fit(), "every tile runs on every GPU from sm_80 on");

constexpr bool is_sliced(Dims dims, const Shape& shape) {
  return (dims.key <= shape.columns || dims.key % shape.columns == 0) &&
         (dims.value <= shape.columns || dims.value % shape.columns == 0);
}
constexpr bool all_sliced() {
  for (const int size : {2, 4}) {
    for (const Dims dims : kTiles) {
      for (const Shape& shape : {forward_shape(dims, size, true), forward_shape(dims, size, false),
                                 query_shape(dims, size), key_value_shape(dims, size)}) {
        if (!is_sliced(dims, shape)) return false;
      }
    }
    for (const Dims dims : kTwiceTiles) {
      if (!is_sliced(dims, tangent_shape(dims, size)) || !is_sliced(dims, second_order_shape(dims, size))) return false;
    }
  }
  return true;
}
static_assert(all_sliced(), "slices are of one width");

// What is to be computed, as far as the schedule depends on it.
struct Sizes {
  int64_t batch, heads, key_heads, queries, keys;
  int key_dim, value_dim, element_size;
  bool plain;  // neither mask nor dropout
};

inline Sizes sizes_of(const Problem& p, int element_size) {
  const bool plain = p.mask.kind == MaskKind::kNone && p.dropout.seeds == nullptr;
  return {p.batch, p.heads, p.key_heads, p.queries, p.keys, p.key_dim, p.value_dim, element_size, plain};
}

// One kernel's share: gridDim = (blocks, slices), blockDim = 32 * warps.
struct Plan {
  Dims tile;
  int warps;
  int rows;   // of a block
  int step;   // rows that pass by at a time
  int items;  // row tiles that a block takes one after the other
  int64_t blocks;
  int slices;
  int shared_bytes;
};

// A block takes several row tiles where there are far more than a GPU has room for, and each is short.
constexpr int kTilesPerMultiprocessor = 16;  // that many blocks are left, at least
constexpr int kMostItems = 8;
constexpr int kShortSteps = 4;

constexpr int warps_for(int64_t rows, const Shape& shape) {
  const int64_t wanted = ceil_div(rows, shape.rows(1));
  return static_cast<int>(wanted < 1 ? 1 : wanted < shape.warps ? wanted : shape.warps);
}

constexpr Dims tile_of(const Sizes& sizes) { return kTiles[find_tile(kTiles, sizes.key_dim, sizes.value_dim)]; }
constexpr Dims twice_tile_of(const Sizes& sizes) {
  return kTwiceTiles[find_tile(kTwiceTiles, sizes.key_dim, sizes.value_dim)];
}

// Blocks own ``rows`` rows of each of ``heads`` heads; the output is ``columns`` wide.
constexpr Plan plan_rows(Dims tile, const Shape& shape, int64_t rows, int64_t heads, int columns) {
  const int warps = warps_for(rows, shape), of_block = shape.rows(warps);
  const int slices = static_cast<int>(ceil_div(columns, shape.columns));
  return {tile, warps, of_block, shape.step, 1, heads * ceil_div(rows, of_block), slices, 0};
}

constexpr Plan forward_plan(const Sizes& sizes, int multiprocessors) {
  const Dims tile = tile_of(sizes);
  const Shape shape = forward_shape(tile, sizes.element_size, sizes.plain);
  Plan plan = plan_rows(tile, shape, sizes.queries, sizes.batch * sizes.heads, tile.value);
  plan.shared_bytes = forward_bytes(tile, sizes.element_size, sizes.plain, plan.warps);
  if (query_buffers(tile, sizes.element_size, sizes.plain) == 2 && ceil_div(sizes.keys, shape.step) <= kShortSteps) {
    const int64_t items = plan.blocks / (int64_t{multiprocessors} * kTilesPerMultiprocessor);
    plan.items = static_cast<int>(items < 1 ? 1 : items < kMostItems ? items : kMostItems);
    plan.blocks = ceil_div(plan.blocks, plan.items);
  }
  return plan;
}

constexpr Plan query_plan(const Sizes& sizes) {
  const Dims tile = tile_of(sizes);
  const Shape shape = query_shape(tile, sizes.element_size);
  Plan plan = plan_rows(tile, shape, sizes.queries, sizes.batch * sizes.heads, tile.key);
  plan.shared_bytes = backward_bytes(tile, sizes.element_size, plan.warps);
  return plan;
}

constexpr Plan key_value_plan(const Sizes& sizes) {
  const Dims tile = tile_of(sizes);
  const Shape shape = key_value_shape(tile, sizes.element_size);
  Plan plan = plan_rows(tile, shape, sizes.keys, sizes.batch * sizes.key_heads, widest(tile));
  plan.shared_bytes = backward_bytes(tile, sizes.element_size, plan.warps);
  return plan;
}

constexpr Plan tangent_plan(const Sizes& sizes) {
  const Dims tile = twice_tile_of(sizes);
  const Shape shape = tangent_shape(tile, sizes.element_size);
  Plan plan = plan_rows(tile, shape, sizes.queries, sizes.batch * sizes.heads, tile.value);
  plan.shared_bytes = tangent_bytes(tile, sizes.element_size, plan.warps);
  return plan;
}

constexpr Plan second_order_query_plan(const Sizes& sizes) {
  const Dims tile = twice_tile_of(sizes);
  const Shape shape = second_order_shape(tile, sizes.element_size);
  Plan plan = plan_rows(tile, shape, sizes.queries, sizes.batch * sizes.heads, tile.key);
  plan.shared_bytes = second_order_bytes(tile, sizes.element_size, plan.warps, true);
  return plan;
}

constexpr Plan second_order_key_value_plan(const Sizes& sizes) {
  const Dims tile = twice_tile_of(sizes);
  const Shape shape = second_order_shape(tile, sizes.element_size);
  Plan plan = plan_rows(tile, shape, sizes.keys, sizes.batch * sizes.key_heads, widest(tile));
  plan.shared_bytes = second_order_bytes(tile, sizes.element_size, plan.warps, false);
  return plan;
}

// A block owns a tile of the mask and goes over what the mask is broadcast to; ``slices`` blocks share that where there
// are few tiles, and their parts are added afterwards, in order. Twice: of second order.
constexpr Plan mask_plan(const Sizes& sizes, const int (&mask)[4], int multiprocessors, bool twice) {
  const int size = sizes.element_size;
  const Dims tile = twice ? twice_tile_of(sizes) : tile_of(sizes);
  const Shape shape = twice ? mask_second_order_shape(tile, size) : mask_shape(tile, size);
  Plan plan = plan_rows(tile, shape, sizes.queries, 1, tile.key);
  plan.shared_bytes = twice ? mask_second_order_bytes(tile, size, plan.warps) : mask_bytes(tile, size, plan.warps);
  const int64_t row_tiles = plan.blocks, key_tiles = ceil_div(sizes.keys, shape.step);
  const int64_t all = sizes.batch * sizes.heads * row_tiles * key_tiles;
  plan.blocks = int64_t{mask[0]} * mask[1] * (mask[2] == 1 ? 1 : row_tiles) * (mask[3] == 1 ? 1 : key_tiles);
  const int64_t each = plan.blocks > 0 ? all / plan.blocks : 1;
  const int64_t wanted = each > 0 ? ceil_div(int64_t{multiprocessors} * kTilesPerMultiprocessor, plan.blocks) : 1;
  const int64_t splits = wanted < each ? wanted : each;
  plan.slices = static_cast<int>(splits < 1 ? 1 : splits);
  return plan;
}

}  // namespace fastgen::attention
