// Tile tables: one row per kernel, storage type and head dim. Host code; the launch plan is in plan.h.
//
// A block owns rows in registers and iterates over tiles of the other operand in shared memory:
//   forward, backward_query, tangent, second_order_query   own BLOCK_M queries, iterate BLOCK_N keys
//   backward_key_value, second_order_key_value             own BLOCK_N keys,    iterate BLOCK_M queries
//
//              iterated tiles -> (shared memory, 1 or 2 stages)
//            +-----+-----+-----+
//   warp 0   |     |     |     |   16 * fragments rows per warp
//   warp 1   |     |     |     |
//   ...      |     |     |     |   block: warps * 16 * fragments rows
//            +-----+-----+-----+
//
// The comments of a row give, for the instantiation that needs most, registers per thread (make cuda-check) and blocks
// per multiprocessor on sm_80, and what prevents a larger tile: registers, or shared memory ("no room" in 99 KiB for a
// second stage, or for more rows per tile).
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "common/tiling.h"

namespace fastgen::attention {

struct Dims {
  int key, value;
};

// Compiled head dims, in order of arithmetic. A problem takes the first pair that holds it, padded with zeros.
constexpr Dims kHeadDims[] = {{16, 32},   {32, 32},   {64, 64},   {32, 128}, {96, 96},
                              {128, 128}, {192, 192}, {256, 256}, {512, 512}};
// The same for tangents and second derivatives, which hold about twice as much per row.
constexpr Dims kSecondOrderHeadDims[] = {{16, 32}, {64, 64}, {32, 128}, {96, 96}, {128, 128}, {256, 256}};
// The same for the gradients of masks, which few problems have, and of those the ones with short rows have kernels of
// their own (one_tile.h): fewer, for the build time.
constexpr Dims kMaskHeadDims[] = {{32, 32}, {64, 64}, {128, 128}, {256, 256}, {512, 512}};
constexpr Dims kMaskSecondOrderHeadDims[] = {{64, 64}, {128, 128}, {256, 256}};

// Beyond these, of kernels in which eight warps share a tile: wide_depth.cuh.
constexpr Dims kWideSecondOrderHeadDims[] = {{512, 512}};

constexpr Dims kLargestHeadDims = kHeadDims[length(kHeadDims) - 1];

constexpr bool holds(Dims compiled, Dims dims) { return dims.key <= compiled.key && dims.value <= compiled.value; }
static_assert(holds(kWideSecondOrderHeadDims[length(kWideSecondOrderHeadDims) - 1], kLargestHeadDims),
              "every problem with a kernel has one for its tangents and second derivatives");

// The index of the compiled head dims of a problem; -1 if it is too large.
template <int kCount>
constexpr int find_head_dims(const Dims (&compiled)[kCount], Dims dims) {
  for (int i = 0; i < kCount; ++i) {
    if (holds(compiled[i], dims)) return i;
  }
  return -1;
}

// The compiled head dims of a problem that they hold.
template <int kCount>
constexpr Dims head_dims_of(const Dims (&compiled)[kCount], Dims dims) {
  return compiled[find_head_dims(compiled, dims)];
}

constexpr int widest(Dims dims) { return larger(dims.key, dims.value); }

struct TileShape {
  int warps;      // maximum; problems with few rows launch fewer
  int fragments;  // of 16 rows, per warp
  int iterated;   // rows of an iterated tile: BLOCK_N keys, or BLOCK_M queries
  int stages;     // 2: copies of the next tile overlap with the products of the current one. The maximum, where the
                  // launch plan chooses: choose_buffers
  int columns;    // of the output, accumulated in registers; wider outputs are split into slices, gridDim.y

  constexpr int owned(int of_warps) const { return of_warps * fragments * kFragmentRows; }
};

struct TileRow {
  Dims dims;  // maximum
  TileShape shape;
};

template <int kCount>
constexpr TileShape find_shape(const TileRow (&table)[kCount], Dims dims) {
  for (int i = 0; i < kCount; ++i) {
    if (holds(table[i].dims, dims)) return table[i].shape;
  }
  return {};
}

// Forward. Plain: no mask, dropout or softcap, whose state needs registers.
// clang-format off
//                                   dims      warps frag BLOCK_N stages columns    regs, blocks: reason
constexpr TileRow kForward16[] = {{{ 64,  64}, {4,   2,   64,     2,     256}},   // 246, 2: no room: rows
                                  {{128, 128}, {4,   2,   32,     2,     256}},   // 255, 2: no room: rows
                                  {{256, 256}, {4,   1,   32,     2,     256}},   // 236, 2: no room: rows
                                  {{512, 512}, {4,   1,   16,     2,     256}}};  // 200, 1: no room: rows
constexpr TileRow kForwardMasked16[] = {
                                  {{ 64,  64}, {4,   2,   32,     2,     256}},   // 250, 2: registers
                                  {{192, 192}, {4,   1,   32,     2,     256}},   // 240, 2: no room: rows
                                  {{256, 256}, {4,   1,   16,     2,     256}},   // 244, 2: registers
                                  {{512, 512}, {4,   1,   16,     2,     256}}};  // 244, 1: no room: rows
constexpr TileRow kForward32[] = {{{ 96, 128}, {4,   2,   16,     2,     256}},   // 254, 2: registers
                                  {{128, 128}, {4,   1,   32,     2,     256}},   // 162, 2: no room: rows
                                  {{192, 192}, {4,   1,   16,     2,     256}},   // 184, 2: no room: rows
                                  {{256, 256}, {4,   1,   16,     2,     256}},   // 216, 1: no room: rows
                                  {{512, 512}, {2,   1,   8,      2,     256}}};  // 210, 1: no room: rows
constexpr TileRow kForwardMasked32[] = {
                                  {{ 32,  32}, {4,   1,   32,     2,     256}},   // 155, 2: registers
                                  {{192, 192}, {4,   1,   16,     2,     256}},   // 199, 2: no room: rows
                                  {{256, 256}, {4,   1,   16,     2,     256}},   // 232, 1: no room: rows
                                  {{512, 512}, {2,   1,   8,      2,     128}}};  // 162, 1: no room: rows

// Backward, both kernels: P and dP of a tile are in registers at the same time. The columns are those of dQ. With two
// fragments, a row of dQ loads two thirds as many operands from shared memory; dK and dV leave no registers for them.
//                                    dims      warps frag iterated stages columns    regs, blocks: reason
constexpr TileRow kBackward16[] = {{{ 64,  64}, {4,   1,   64,      2,     256}},   // 249, 2: registers
                                   {{128, 128}, {4,   1,   32,      2,     256}},   // 252, 2: no room: rows
                                   {{192, 192}, {4,   1,   32,      2,     256}},   // 239, 2: no room: rows
                                   {{256, 256}, {4,   1,   16,      2,     256}},   // 244, 1: no room: rows
                                   {{512, 512}, {2,   1,   16,      2,     256}}};  // 244, 1: no room: rows
constexpr TileRow kBackward32[] = {{{ 64,  64}, {4,   1,   32,      2,     256}},   // 192, 2: no room: rows
                                   {{128, 128}, {4,   1,   16,      2,     256}},   // 213, 1: no room: rows
                                   {{192, 192}, {2,   1,   16,      2,     256}},   // 199, 2: no room: rows
                                   {{256, 256}, {2,   1,   16,      2,     256}},   // 223, 1: no room: rows
                                   {{512, 512}, {1,   1,   8,       2,     256}}};  // 223, 1: no room: rows

constexpr TileRow kBackwardQuery16[] = {
                                    {{ 64,  64}, {4,   2,   32,      2,     256}}};  // 248, 2: registers; wider: above

// Tangent: the operands and their tangents are in shared memory.
//                                   dims      warps frag BLOCK_N stages columns    regs, blocks: reason
constexpr TileRow kTangent16[] = {{{ 16,  32}, {4,   1,   64,     2,     256}},   // 219, 2: registers
                                  {{ 96, 128}, {4,   1,   32,     2,     256}},   // 224, 2: no room: rows
                                  {{128, 128}, {4,   1,   32,     1,     256}},   // 220, 2: no room: stage 2
                                  {{256, 256}, {4,   1,   16,     1,     256}}};  // 255, 1: no room: stage 2
constexpr TileRow kTangent32[] = {{{ 64,  64}, {4,   1,   16,     2,     128}},   // 154, 2: no room: rows
                                  {{ 32, 128}, {4,   1,   16,     2,     128}},   // 174, 2: no room: rows
                                  {{128, 128}, {4,   1,   16,     1,     128}},   // 184, 1: no room: stage 2
                                  {{256, 256}, {2,   1,   8,      1,     128}}};  // 165, 1: no room: stage 2

// Second order, both kernels: four tiles of scores (S, W, dP, dO Gv^T) are in registers at the same time.
//                                       dims      warps frag iterated stages columns    regs, blocks: reason
constexpr TileRow kSecondOrder16[] = {{{ 96, 128}, {4,   1,   32,      2,     128}},   // 250, 1: no room: rows
                                      {{128, 128}, {4,   1,   16,      2,     128}},   // 252, 1: no room: rows
                                      {{256, 256}, {2,   1,   16,      1,     128}}};  // 252, 1: no room: stage 2
constexpr TileRow kSecondOrder32[] = {{{ 16,  32}, {4,   1,   32,      2,     128}},   // 214, 2: registers
                                      {{ 64,  64}, {4,   1,   16,      2,     128}},   // 212, 1: no room: rows
                                      {{ 96, 128}, {2,   1,   16,      2,     128}},   // 242, 1: no room: rows
                                      {{128, 128}, {2,   1,   16,      1,     128}},   // 254, 1: no room: stage 2
                                      {{256, 256}, {1,   1,   8,       1,     128}}};  // 221, 1: no room: stage 2
// clang-format on

// Wide heads, of 16 bits: eight warps share a tile of BLOCK_M queries and BLOCK_N keys (wide.cuh). GPUs whose blocks
// may not have that much shared memory take the kernels above.
struct WideShape {
  int owned, iterated;
};
constexpr int kWideWarps = 8;
constexpr Dims kWideHeadDims[] = {{512, 512}};
constexpr bool is_wide(Dims compiled) {
  for (const Dims dims : kWideHeadDims) {
    if (dims.key == compiled.key && dims.value == compiled.value) return true;
  }
  return false;
}
constexpr WideShape kWideForward = {64, 32};
constexpr WideShape kWideBackward = {32, 32};  // of both kernels

// Tangents and second order of wide heads (wide_depth.cuh): owned rows of a block, and rows of a tile. A tile of second
// order has 16 rows of 4 KiB in 16 bits, 8 rows of 8 KiB in float32: 99 KiB have room for one stage.
constexpr int kWideOwned = 16;
constexpr int wide_iterated(int element_size) { return element_size == 4 ? 8 : 16; }
template <typename T>
constexpr int kWideIterated = wide_iterated(sizeof(T));

constexpr TileShape forward_shape(Dims dims, int element_size, bool plain) {
  if (element_size == 4) return plain ? find_shape(kForward32, dims) : find_shape(kForwardMasked32, dims);
  return plain ? find_shape(kForward16, dims) : find_shape(kForwardMasked16, dims);
}

constexpr TileShape backward_shape(Dims dims, int element_size) {
  return element_size == 4 ? find_shape(kBackward32, dims) : find_shape(kBackward16, dims);
}

constexpr TileShape backward_query_shape(Dims dims, int element_size) {
  const TileShape shape = element_size == 4 ? TileShape{} : find_shape(kBackwardQuery16, dims);
  return shape.warps > 0 ? shape : backward_shape(dims, element_size);
}

// Two accumulators, dK and dV, so half the columns.
constexpr TileShape backward_key_value_shape(Dims dims, int element_size) {
  TileShape shape = backward_shape(dims, element_size);
  shape.columns = widest(dims) == 192 ? 96 : 128;
  return shape;
}

// Both operands change from item to item, so two stages fit only for narrow heads.
constexpr TileShape mask_gradient_shape(Dims dims, int element_size) {
  TileShape shape = backward_shape(dims, element_size);
  shape.stages = widest(dims) <= 64 && element_size == 2 ? 2 : 1;
  return shape;
}

constexpr TileShape tangent_shape(Dims dims, int element_size) {
  return element_size == 4 ? find_shape(kTangent32, dims) : find_shape(kTangent16, dims);
}

constexpr TileShape second_order_shape(Dims dims, int element_size) {
  return element_size == 4 ? find_shape(kSecondOrder32, dims) : find_shape(kSecondOrder16, dims);
}

constexpr TileShape mask_second_order_shape(Dims dims, int element_size) {
  TileShape shape = second_order_shape(dims, element_size);
  shape.stages = 1;
  return shape;
}

// Dynamic shared memory.
//
// As many stages and, in the forward pass, query tiles as leave room for two blocks per multiprocessor, because the
// four warps of one block, one for each scheduler, cannot hide the latencies of copies and softmax; if there is no room
// for two blocks in any case, or the grid has no more blocks than the GPU multiprocessors, as many as one block may
// have. So sm_86, sm_89 and sm_120, with 100 KiB, have fewer than sm_80 with 164 KiB and sm_90 with 228 KiB.
struct Buffers {
  int stages;
  int queries;  // tiles of BLOCK_M queries
};

struct Gpu {
  int multiprocessors;
  int shared_limit;  // maximum of a block, in bytes
};

// ``blocks``: of the grid. bytes(buffers): of a block.
template <typename Bytes>
constexpr Buffers choose_buffers(Buffers most, int64_t blocks, const Gpu& gpu, Bytes&& bytes) {
  for (const int resident : {2, 1}) {
    if (resident == 2 && blocks <= gpu.multiprocessors) continue;
    for (const Buffers buffers : {most, Buffers{most.stages, 1}, Buffers{1, 1}}) {
      if (blocks_by_shared_memory(bytes(buffers), gpu.shared_limit) >= resident) return buffers;
    }
  }
  return {1, 1};
}

// Query tiles in shared memory, at most. 2: the next query tile of the block is copied during the last key tile of the
// current one.
constexpr int query_buffers(Dims dims, int element_size, bool plain) {
  return widest(dims) <= 64 && forward_shape(dims, element_size, plain).stages == 2 ? 2 : 1;
}

constexpr int forward_bytes(Dims dims, int element_size, bool plain, int warps, Buffers buffers) {
  const TileShape shape = forward_shape(dims, element_size, plain);
  const int query = shape.owned(warps) * row_bytes(dims.key, element_size);
  const int key_value = row_bytes(dims.key, element_size) + row_bytes(smaller(dims.value, shape.columns), element_size);
  return buffers.queries * query + buffers.stages * shape.iterated * key_value;
}

// Weights of a tile, with floats per row in the padding, partial scores, and live keys: a word per warp and lane of a
// row.
constexpr int wide_forward_state_bytes(Dims dims, int element_size) {
  return kWideForward.owned * (row_bytes(dims.key, element_size) + row_bytes(kWideForward.iterated, element_size) +
                               kWideForward.iterated * static_cast<int>(sizeof(float))) +
         kWideWarps * 4 * static_cast<int>(sizeof(uint32_t));
}
constexpr int wide_forward_bytes(Dims dims, int element_size, int stages) {
  return wide_forward_state_bytes(dims, element_size) +
         stages * kWideForward.iterated * (row_bytes(dims.key, element_size) + row_bytes(dims.value, element_size));
}

// ``shape``: that of the kernel.
constexpr int backward_bytes(Dims dims, const TileShape& shape, int element_size, int warps, Buffers buffers) {
  return (shape.owned(warps) + buffers.stages * shape.iterated) *
         (row_bytes(dims.key, element_size) + row_bytes(dims.value, element_size));
}

// P and dS of a tile, dP in float32, and live columns.
constexpr int wide_backward_state_bytes(Dims dims, int element_size) {
  return kWideBackward.owned * (row_bytes(dims.key, element_size) + row_bytes(dims.value, element_size) +
                                2 * row_bytes(kWideBackward.iterated, element_size) +
                                kWideBackward.iterated * static_cast<int>(sizeof(float))) +
         kWideWarps / 2 * 4 * static_cast<int>(sizeof(uint32_t));
}
constexpr int wide_backward_bytes(Dims dims, int element_size, int stages) {
  return wide_backward_state_bytes(dims, element_size) +
         stages * kWideBackward.iterated * (row_bytes(dims.key, element_size) + row_bytes(dims.value, element_size));
}

constexpr int mask_gradient_bytes(Dims dims, int element_size, int warps) {
  const TileShape shape = mask_gradient_shape(dims, element_size);
  return shape.stages * (shape.owned(warps) + shape.iterated) *
         (row_bytes(dims.key, element_size) + row_bytes(dims.value, element_size));
}

// Bytes per row of a QueryTangentTile (query, its tangent, optionally dO) and of a KeyTangentTile (key, value,
// tangents).
constexpr int query_tangent_bytes(Dims dims, int element_size, bool with_grad_out) {
  return 2 * row_bytes(dims.key, element_size) + (with_grad_out ? row_bytes(dims.value, element_size) : 0);
}
constexpr int key_tangent_bytes(Dims dims, int element_size) {
  return 2 * (row_bytes(dims.key, element_size) + row_bytes(dims.value, element_size));
}

constexpr int tangent_bytes(Dims dims, int element_size, int warps, Buffers buffers) {
  const TileShape shape = tangent_shape(dims, element_size);
  const Dims slice = {dims.key, smaller(dims.value, shape.columns)};
  return shape.owned(warps) * query_tangent_bytes(dims, element_size, false) +
         buffers.stages * shape.iterated * key_tangent_bytes(slice, element_size);
}

constexpr int second_order_bytes(Dims dims, int element_size, int warps, Buffers buffers, bool owns_queries) {
  const TileShape shape = second_order_shape(dims, element_size);
  const int query = query_tangent_bytes(dims, element_size, true), key = key_tangent_bytes(dims, element_size);
  const int iterated = buffers.stages * shape.iterated;
  return owns_queries ? shape.owned(warps) * query + iterated * key : shape.owned(warps) * key + iterated * query;
}

// Partial sums of each of eight warps for ``kinds`` products, and a word per warp.
constexpr int wide_exchange_bytes(int kinds, int element_size) {
  const int scores = kWideOwned * wide_iterated(element_size);
  return kWideWarps * (kinds * scores + 1) * static_cast<int>(sizeof(float));
}
constexpr int wide_tangent_bytes(Dims dims, int element_size, int stages) {
  return wide_exchange_bytes(2, element_size) +
         stages * wide_iterated(element_size) * key_tangent_bytes(dims, element_size);
}

constexpr int wide_second_order_bytes(Dims dims, int element_size, int stages, bool owns_queries) {
  const int query = query_tangent_bytes(dims, element_size, true), key = key_tangent_bytes(dims, element_size);
  return wide_exchange_bytes(4, element_size) + stages * wide_iterated(element_size) * (owns_queries ? key : query);
}

constexpr int mask_second_order_bytes(Dims dims, int element_size, int warps) {
  const TileShape shape = mask_second_order_shape(dims, element_size);
  return shape.owned(warps) * query_tangent_bytes(dims, element_size, true) +
         shape.iterated * key_tangent_bytes(dims, element_size);
}

// Static shared memory of the kernels of mask gradients: a float per column and warp, for the sum over rows. Dynamic
// shared memory begins after it, at a multiple of its alignment (device/shared.cuh).
constexpr int mask_static_bytes(const TileShape& shape) {
  constexpr int kAlignment = 1024;
  const int bytes = shape.warps * shape.iterated * static_cast<int>(sizeof(float));
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// The launch plan adds stages and query buffers only where they fit.
constexpr bool all_fit() {
  for (const int size : {2, 4}) {
    for (const Dims dims : kHeadDims) {
      for (const bool plain : {false, true}) {
        const int warps = forward_shape(dims, size, plain).warps;
        if (forward_bytes(dims, size, plain, warps, {1, 1}) > kSharedLimit) return false;
      }
      for (const TileShape& shape : {backward_query_shape(dims, size), backward_key_value_shape(dims, size)}) {
        if (backward_bytes(dims, shape, size, shape.warps, {1, 1}) > kSharedLimit) return false;
      }
      const TileShape mask = mask_gradient_shape(dims, size);
      if (mask_gradient_bytes(dims, size, mask.warps) + mask_static_bytes(mask) > kSharedLimit) return false;
    }
    for (const Dims dims : kSecondOrderHeadDims) {
      const int warps = second_order_shape(dims, size).warps;
      if (tangent_bytes(dims, size, tangent_shape(dims, size).warps, {1, 1}) > kSharedLimit ||
          second_order_bytes(dims, size, warps, {1, 1}, true) > kSharedLimit ||
          second_order_bytes(dims, size, warps, {1, 1}, false) > kSharedLimit ||
          mask_second_order_bytes(dims, size, warps) + mask_static_bytes(mask_second_order_shape(dims, size)) >
              kSharedLimit) {
        return false;
      }
    }
  }
  return true;
}
static_assert(all_fit(), "the shared memory of every tile fits every GPU from sm_80 on");

constexpr bool all_wide_fit() {
  for (const Dims dims : kWideHeadDims) {
    for (const int stages : {1, 2}) {
      const int limit = stages == 1 ? kSharedLimit80 : kSharedLimit90;
      if (wide_forward_bytes(dims, 2, stages) > limit || wide_backward_bytes(dims, 2, stages) > limit) return false;
    }
  }
  return true;
}
constexpr bool all_wide_second_order_fit() {
  for (const Dims dims : kWideSecondOrderHeadDims) {
    for (const int size : {2, 4}) {
      for (const int stages : {1, 2}) {
        const int limit = stages == 1 ? kSharedLimit : kSharedLimit80;
        if (wide_tangent_bytes(dims, size, stages) > limit ||
            wide_second_order_bytes(dims, size, stages, true) > limit ||
            wide_second_order_bytes(dims, size, stages, false) > limit) {
          return false;
        }
      }
    }
  }
  return true;
}
static_assert(all_wide_second_order_fit(), "every GPU has room for one stage of wide heads, sm_80 for two");
static_assert(all_wide_fit(), "sm_80 has room for one stage of wide heads, sm_90 for two");

constexpr bool is_sliced(Dims dims, const TileShape& shape) {
  return (dims.key <= shape.columns || dims.key % shape.columns == 0) &&
         (dims.value <= shape.columns || dims.value % shape.columns == 0);
}
constexpr bool all_sliced() {
  for (const int size : {2, 4}) {
    for (const Dims dims : kHeadDims) {
      for (const TileShape& shape : {forward_shape(dims, size, true), forward_shape(dims, size, false),
                                     backward_query_shape(dims, size), backward_key_value_shape(dims, size)}) {
        if (!is_sliced(dims, shape)) return false;
      }
    }
    for (const Dims dims : kSecondOrderHeadDims) {
      if (!is_sliced(dims, tangent_shape(dims, size)) || !is_sliced(dims, second_order_shape(dims, size))) return false;
    }
  }
  return true;
}
static_assert(all_sliced(), "all slices of an output have the same width");

}  // namespace fastgen::attention
