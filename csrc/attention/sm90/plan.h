// Tiles and launch plan of the kernels for sm_90a, and the problems that they serve. Host code.
//
// A block is three warpgroups, one per multiprocessor: a producer, of which one thread copies tiles, and two consumers
// with 64 queries each.
#pragma once

#include "attention/plan.h"

namespace fastgen::attention::sm90 {

constexpr int kGroupThreads = 128, kGroupRows = 64;
constexpr int kConsumers = 2;
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

// Head dims, of keys and values alike; narrower heads are padded with zeros. The others are left to the other kernels.
constexpr int kHeadDims90[] = {64, 128};
constexpr int kNarrowest = 32;  // up to here the others have tiles of their own

// Shared memory: rows of a tile are 128 bytes, 64 columns; a tile is one panel of rows for each 64 columns.
constexpr int kPanelDim = 64, kPanelRowBytes = 128;
FASTGEN_HOST_DEVICE constexpr int panel_bytes(int rows) { return rows * kPanelRowBytes; }
FASTGEN_HOST_DEVICE constexpr int tile_bytes(int rows, int head_dim) {
  return head_dim / kPanelDim * panel_bytes(rows);
}

constexpr int stages(int head_dim) { return head_dim <= 64 ? 4 : 2; }
constexpr int forward_bytes(int head_dim) {
  return tile_bytes(BLOCK_M, head_dim) + 2 * stages(head_dim) * tile_bytes(BLOCK_N, head_dim);
}
constexpr int kMbarrierBytes = 1024;  // aligned like dynamic shared memory, which follows
static_assert(forward_bytes(64) + kMbarrierBytes <= kSharedLimit90 &&
                  forward_bytes(128) + kMbarrierBytes <= kSharedLimit90,
              "the tiles fit sm_90");

// The compiled head dim of a problem; 0 if it is not served.
constexpr int head_dim_of(const Sizes& sizes) {
  const int dim = larger(sizes.key_dim, sizes.value_dim), narrower = smaller(sizes.key_dim, sizes.value_dim);
  for (const int compiled : kHeadDims90) {
    if (dim <= compiled) return narrower > (compiled == 64 ? kNarrowest : 64) ? compiled : 0;
  }
  return 0;
}

// Why the problem is not served, or null. ``plain`` may be true of problems with a boolean mask of keys too.
constexpr const char* refusal(const Sizes& sizes) {
  if (sizes.element_size != 2) return "float32";
  if (!sizes.plain) return "a mask of scores, dropout, softcap or packed sequences";
  if (head_dim_of(sizes) == 0) return "head dims: key and value both in 40 ... 64 or 72 ... 128";
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

constexpr Plan forward_plan(const Sizes& sizes, int multiprocessors) {
  const int dim = head_dim_of(sizes);
  const int64_t tiles = sizes.batch * sizes.heads * ceil_div(sizes.queries, BLOCK_M);
  Plan plan = {{dim, dim}, kThreads / 32, BLOCK_M, BLOCK_N, 1, 0, 1, 0};
  plan.blocks = tiles < multiprocessors ? tiles : multiprocessors;
  plan.tiles_per_block = static_cast<int>(ceil_div(tiles, plan.blocks < 1 ? 1 : plan.blocks));  // at most
  plan.shared_bytes = forward_bytes(dim), plan.stages = stages(dim);
  return plan;
}

}  // namespace fastgen::attention::sm90
