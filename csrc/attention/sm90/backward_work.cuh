// The owned tiles of the backward kernels for sm_90a, and the iterated tiles of each.
//
// kPadded: with a boolean mask of keys. Then the functions are called by whole warps. A mask is found from the params
// where it is read: the consumers have no registers for it.
#pragma once

#include "attention/scheduler.cuh"
#include "attention/sm90/backward_plan.h"

namespace fastgen::attention::sm90 {

// Passed to a kernel.
struct BackwardSchedule {
  int tiles = 0;          // owned ones, of all heads
  int heads_in_turn = 1;  // plan.h
  int group_size = 1;     // heads per key head
};

// The i-th owned tile: of each group of heads first the first tile of each head, then the second.
struct TileInTurn {
  unsigned batch_head;
  int tile;

  __device__ __forceinline__ TileInTurn(const BackwardSchedule& schedule, int i, int of_head, int all_heads) {
    const int64_t of_turn = static_cast<int64_t>(of_head) * schedule.heads_in_turn;
    const int turn = static_cast<int>(i / of_turn), first_head = turn * schedule.heads_in_turn;
    const int heads = smaller(schedule.heads_in_turn, all_heads - first_head);
    const int at = static_cast<int>(i - turn * of_turn);
    batch_head = static_cast<unsigned>(first_head + at % heads), tile = at / heads;
  }
};

// A tile of keys. With padding, one bit for each that is in the window of a query of the block and that the mask does
// not exclude.
template <bool kPadded>
struct LiveKeys {
  int index;
};
template <>
struct LiveKeys<true> : LiveKeys<false> {
  uint64_t live[2];
};

// kOwned queries of one head.
template <typename T, bool kPadded, int kOwned, int kIterated>
struct QueryWork {
  using Tile = LiveKeys<kPadded>;
  static_assert(kIterated == 128, "two words of bits");
  unsigned batch, head;
  Range queries, keys;  // keys: in the window of at least one query

  __device__ __forceinline__ QueryWork(const Problem& p, const BackwardSchedule& schedule, int i) {
    // The last tile of a head first: under a causal mask it has most keys.
    const int of_head = (p.queries + kOwned - 1) / kOwned;
    const TileInTurn turn(schedule, i, of_head, p.batch * p.heads);
    batch = turn.batch_head / static_cast<unsigned>(p.heads), head = turn.batch_head % static_cast<unsigned>(p.heads);
    const int first = (of_head - 1 - turn.tile) * kOwned;
    queries = {first, smaller(first + kOwned, p.queries)};
    keys = keys_in_window(p, queries, p.keys);
  }
  __device__ __forceinline__ QueryBlock block(const Problem& p) const {
    const auto of_head = static_cast<unsigned>((p.queries + kOwned - 1) / kOwned);
    const unsigned tile = static_cast<unsigned>(queries.begin / kOwned);
    return {p, (batch * static_cast<unsigned>(p.heads) + head + 1) * of_head - 1 - tile, kOwned, MayPack<false>{}};
  }
  __device__ __forceinline__ unsigned key_head(const BackwardSchedule& schedule) const {
    return head / static_cast<unsigned>(schedule.group_size);
  }
  __device__ __forceinline__ Tile first(const Problem& p) const { return find(p, keys.begin / kIterated); }
  __device__ __forceinline__ Tile next(const Problem& p, const Tile& tile) const { return find(p, tile.index + 1); }
  __device__ __forceinline__ bool contains(const Tile& tile) const { return tile.index * kIterated < keys.end; }
  __device__ __forceinline__ int key(const Tile& tile) const { return tile.index * kIterated; }

  // Whether a key is one that a query of the block may attend to, and whether all of a tile are.
  __device__ __forceinline__ bool is_live(const Tile& tile, int row) const {
    if constexpr (kPadded) {
      const uint64_t word = row < 64 ? tile.live[0] : tile.live[1];  // an index would put them into local memory
      return (word >> (row % 64) & 1) != 0;
    } else {
      return key(tile) + row >= keys.begin && key(tile) + row < keys.end;
    }
  }
  __device__ __forceinline__ bool is_whole(const Tile& tile) const {
    if constexpr (kPadded) {
      return (tile.live[0] & tile.live[1]) == full<64>();
    } else {
      return key(tile) >= keys.begin && key(tile) + kIterated <= keys.end;
    }
  }

 private:
  // The first tile from ``index`` on with a live key.
  __device__ __forceinline__ Tile find(const Problem& p, int index) const {
    if constexpr (kPadded) {
      Tile tile = {{index}, {}};
      const HeadMask<T> mask(p.mask, batch, head);
#pragma unroll 1
      for (; contains(tile); ++tile.index) {
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          tile.live[word] = mask.template live<64, false>(keys, key(tile) + 64 * word);
        }
        if ((tile.live[0] | tile.live[1]) != 0) break;
      }
      return tile;
    } else {
      return {index};
    }
  }
};

// Whether the boolean mask of a head has a key in the range that it does not exclude.
template <typename T>
__device__ __forceinline__ bool is_any_live(const Problem& p, unsigned batch, unsigned head, Range keys) {
  const HeadMask<T> mask(p.mask, batch, head);
  bool found = false;
#pragma unroll 1
  for (int key = keys.begin + static_cast<int>(threadIdx.x % 32); key < keys.end; key += 32) {
    found = found || !mask.excludes(0, key);
  }
  return device::any_lane(found);
}

// A tile of queries of one head of the group. With padding, one bit for each of the warp's 16 keys that exists and that
// the head's mask does not exclude.
template <bool kPadded>
struct QueryTile {
  int head, tile;  // of the group, of the head
};
template <>
struct QueryTile<true> : QueryTile<false> {
  uint32_t live;
};

// kOwned keys of one key head.
template <typename T, bool kPadded, int kOwned, int kIterated>
struct KeyWork {
  using Tile = QueryTile<kPadded>;
  unsigned batch, key_head;
  Range keys;
  int first_tile, tiles_per_head, warp_row;

  // ``warp_row``: of the warp's first key, in a consumer.
  __device__ __forceinline__ KeyWork(const Problem& p, const BackwardSchedule& schedule, int i, int warp_row)
      : warp_row(warp_row) {
    // The first tile of a head first: under a causal mask it has most queries.
    const TileInTurn turn(schedule, i, (p.keys + kOwned - 1) / kOwned, p.batch * p.key_heads);
    const auto key_heads = static_cast<unsigned>(p.key_heads);
    batch = turn.batch_head / key_heads, key_head = turn.batch_head % key_heads;
    const int first = turn.tile * kOwned;
    keys = {first, smaller(first + kOwned, p.keys)};
    const Range queries = queries_in_window(p, keys, p.queries);
    first_tile = queries.begin / kIterated;
    tiles_per_head = queries.empty() ? 0 : (queries.end + kIterated - 1) / kIterated - first_tile;
  }
  // The tiles of all heads of the group.
  __device__ __forceinline__ Tile first(const Problem& p, const BackwardSchedule& schedule) const {
    return find(p, schedule, tiles_per_head > 0 ? 0 : schedule.group_size);
  }
  __device__ __forceinline__ Tile next(const Problem& p, const BackwardSchedule& schedule, const Tile& tile) const {
    if (tile.tile + 1 == tiles_per_head) return find(p, schedule, tile.head + 1);
    Tile result = tile;
    ++result.tile;
    return result;
  }
  __device__ __forceinline__ bool contains(const BackwardSchedule& schedule, const Tile& tile) const {
    return tile.head < schedule.group_size;
  }

  __device__ __forceinline__ unsigned head(const BackwardSchedule& schedule, int of_group) const {
    return key_head * static_cast<unsigned>(schedule.group_size) + static_cast<unsigned>(of_group);
  }
  __device__ __forceinline__ int query(const Tile& tile) const { return (first_tile + tile.tile) * kIterated; }

 private:
  // The first tile of the first head from ``head`` on whose mask has a live key.
  __device__ __forceinline__ Tile find(const Problem& p, const BackwardSchedule& schedule, int head) const {
    if constexpr (kPadded) {
      const auto number = [&] { return this->head(schedule, head); };
#pragma unroll 1
      while (head < schedule.group_size && !is_any_live<T>(p, batch, number(), keys)) ++head;
      uint32_t live = 0;
      if (head < schedule.group_size) {
        const int lane = static_cast<int>(threadIdx.x % 32), key = keys.begin + warp_row + lane;
        const HeadMask<T> mask(p.mask, batch, number());
        live = device::ballot(lane < kFragmentRows && key < keys.end && !mask.excludes(0, key));
      }
      return {{head, 0}, live};
    } else {
      return {head, 0};
    }
  }
};

}  // namespace fastgen::attention::sm90
