// Tiles and launch plan of the kernels for sm_90a, and the problems that they serve. Host code.
//
// A block is three or four warpgroups, one per multiprocessor: a producer, of which one thread copies tiles, and two or
// three consumers with 64 queries each.
#pragma once

#include "attention/plan.h"

namespace fastgen::attention::sm90 {

constexpr int kGroupThreads = 128, kGroupRows = 64;
constexpr int kConsumers = 2;  // of most kernels
constexpr int BLOCK_M = kConsumers * kGroupRows, BLOCK_N = 128;
constexpr int kThreads = (1 + kConsumers) * kGroupThreads;

// Registers per thread. At the launch each thread has as many as 65536 allow for 384 threads, in steps of 8.
constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
struct Registers {
  int producer, consumer;
};
// With padding the producer reads the mask.
constexpr Registers kPlainRegisters = {24, 240}, kPaddedRegisters = {40, 232};
constexpr bool add_up(Registers each) {
  return each.producer + kConsumers * each.consumer <= (1 + kConsumers) * kLaunchRegisters;
}
static_assert(add_up(kPlainRegisters) && add_up(kPaddedRegisters), "what consumers gain is what the producer gives up");

// With three consumers, 512 threads.
constexpr Registers kThreeConsumers = {32, 160};
static_assert(kThreeConsumers.producer + 3 * kThreeConsumers.consumer <= 4 * (65536 / (4 * kGroupThreads) / 8 * 8),
              "what consumers gain is what the producer gives up");
FASTGEN_HOST_DEVICE constexpr Registers registers_of(int consumers, bool padded) {
  return consumers == 3 ? kThreeConsumers : padded ? kPaddedRegisters : kPlainRegisters;
}

// Head dims, of keys and values alike; narrower heads are padded with zeros. The others are left to the other kernels.
constexpr int kHeadDims90[] = {64, 128, 192, 256};
constexpr int kNarrowest = 32;  // up to here the others have tiles of their own

// Shared memory: rows of a tile are 128 bytes, 64 columns; a tile is one panel of rows for each 64 columns.
constexpr int kPanelDim = 64, kPanelRowBytes = 128;
FASTGEN_HOST_DEVICE constexpr int panel_bytes(int rows) { return rows * kPanelRowBytes; }
FASTGEN_HOST_DEVICE constexpr int tile_bytes(int rows, int head_dim) {
  return head_dim / kPanelDim * panel_bytes(rows);
}

// Tiles of the forward pass: as many keys as shared memory has room for in two stages, and registers beside the output,
// of which a consumer's thread has head_dim / 2.
constexpr int stages(int head_dim) { return head_dim <= 64 ? 4 : 2; }
// With padding its bits take registers too. kLongTile: of head dim 128 without padding and window.
constexpr int kLongTile = 160;
FASTGEN_HOST_DEVICE constexpr int most_keys(int head_dim, bool padded) {
  return head_dim <= 128 ? BLOCK_N : head_dim <= 192 ? 96 : padded ? 64 : 80;
}
// With two buffers for queries, those of the next tile are copied during the current one.
FASTGEN_HOST_DEVICE constexpr int forward_query_buffers(int head_dim) { return head_dim <= 128 ? 2 : 1; }
constexpr int forward_bytes(int head_dim, int consumers, int keys) {
  return forward_query_buffers(head_dim) * tile_bytes(consumers * kGroupRows, head_dim) +
         2 * stages(head_dim) * tile_bytes(keys, head_dim);
}
constexpr int kMbarrierBytes = 1024;  // aligned like dynamic shared memory, which follows
constexpr bool forward_fits(int head_dim, int consumers, int keys) {
  return forward_bytes(head_dim, consumers, keys) + kMbarrierBytes <= kSharedLimit90;
}
static_assert(forward_fits(64, 3, BLOCK_N) && forward_fits(128, 2, kLongTile) &&
                  forward_fits(192, 2, most_keys(192, false)) && forward_fits(256, 2, most_keys(256, false)),
              "the tiles fit sm_90");

// The compiled head dim of a problem; 0 if it is not served.
constexpr int head_dim_of(const Sizes& sizes) {
  const int dim = larger(sizes.key_dim, sizes.value_dim), narrower = smaller(sizes.key_dim, sizes.value_dim);
  for (const int compiled : kHeadDims90) {
    if (dim <= compiled) return narrower > (compiled == 64 ? kNarrowest : compiled - 64) ? compiled : 0;
  }
  return 0;
}

// Why the problem is not served, or null. ``plain`` may be true of problems with a boolean mask of keys too.
constexpr const char* refusal(const Sizes& sizes) {
  if (sizes.element_size != 2) return "float32";
  if (!sizes.plain) return "a mask of scores, dropout, softcap or packed sequences";
  if (head_dim_of(sizes) == 0) return "head dims: key and value both in 40 ... 64, or 72 ... 128, ... 192, ... 256";
  if (sizes.queries == 0 || sizes.keys == 0) return "no queries or no keys";
  return nullptr;
}

// Tiles of queries are distributed over a persistent grid. With a bounded window, such as that of a causal mask, a
// head's tiles have different lengths: the longest of several heads go first, of as many as L2 has room for.
constexpr int64_t kL2Bytes = 32 << 20;
constexpr int heads_in_turn(const Sizes& sizes, bool causal) {
  if (!causal) return 1;
  const int64_t bytes = sizes.keys * (sizes.key_dim + sizes.value_dim) * sizes.element_size;
  const int64_t fitting = kL2Bytes / (bytes > 0 ? bytes : 1), all = sizes.batch * sizes.heads;
  return static_cast<int>(fitting < 1 ? 1 : fitting < all ? fitting : all);
}

// Consumers of the forward pass. A block of three takes hardly more time for a key tile than one of two with head dim
// 64, where the softmax limits two (benchmarks/model/predictions.md), so fewer rounds of blocks decide; with wider
// heads, or padding, the registers do not suffice for three.
constexpr int forward_consumers(const Sizes& sizes, int multiprocessors, bool padded = false) {
  if (padded || head_dim_of(sizes) > 64) return 2;
  const auto rounds = [&](int consumers) {
    return ceil_div(sizes.batch * sizes.heads * ceil_div(sizes.queries, consumers * kGroupRows), multiprocessors);
  };
  return rounds(3) < rounds(2) ? 3 : 2;
}

// Keys of a tile: the long ones where they add at most a 64th to what is computed. They leave more time for the softmax
// of one tile beside the products of another.
constexpr int forward_keys(const Sizes& sizes, bool padded, bool windowed) {
  const int dim = head_dim_of(sizes), keys = most_keys(dim, padded);
  if (dim != 128 || padded || windowed) return keys;
  const auto computed = [&](int tile) { return ceil_div(sizes.keys, tile) * tile; };
  return 64 * computed(kLongTile) <= 65 * computed(keys) ? kLongTile : keys;
}

// ``windowed``: with a causal mask or another window.
constexpr Plan forward_plan(const Sizes& sizes, int multiprocessors, bool padded = false, bool windowed = false) {
  const int dim = head_dim_of(sizes), consumers = forward_consumers(sizes, multiprocessors, padded);
  const int rows = consumers * kGroupRows, keys = forward_keys(sizes, padded, windowed);
  const int64_t tiles = sizes.batch * sizes.heads * ceil_div(sizes.queries, rows);
  Plan plan = {{dim, dim}, (1 + consumers) * kGroupThreads / 32, rows, keys, 1, 0, 1, 0};
  plan.blocks = tiles < multiprocessors ? tiles : multiprocessors;
  plan.tiles_per_block = static_cast<int>(ceil_div(tiles, plan.blocks < 1 ? 1 : plan.blocks));  // at most
  plan.shared_bytes = forward_bytes(dim, consumers, keys), plan.stages = stages(dim);
  plan.query_buffers = forward_query_buffers(dim);
  return plan;
}

}  // namespace fastgen::attention::sm90
