// Tile scheduler: the rows that a block owns, and the tiles of the other operand that it iterates over.
//
//   QueryBlock  queries of one head               iterates over KeyTiles: keys, values
//   KeyBlock    keys and values of one key head   iterates over QueryTiles: queries, dO of each head of the group
//
// Tiles that the window or a per-key mask excludes for the whole block are neither copied nor computed.
#pragma once

#include "attention/mask.cuh"

namespace fastgen::attention {

// Address of a row of a head. Unsigned indices: no sign extension to 64 bits.
template <typename T>
__device__ __forceinline__ const T* row_pointer(const Operand& operand, unsigned batch, unsigned head, unsigned row) {
  return static_cast<const T*>(operand.data) + batch * operand.batch + head * operand.head + row * operand.row;
}
template <typename T>
__device__ __forceinline__ T* row_pointer(const Result& result, unsigned batch, unsigned head, unsigned row) {
  return static_cast<T*>(result.data) + batch * result.batch + head * result.head + row * result.row;
}
__device__ __forceinline__ const float* row_pointer(const RowInput& input, unsigned batch, unsigned head,
                                                    unsigned row) {
  return input.data + batch * input.batch + head * input.head + row * input.row;
}
__device__ __forceinline__ float* row_pointer(const RowResult& result, unsigned batch, unsigned head, unsigned row) {
  return result.data + batch * result.batch + head * result.head + row * result.row;
}

// BLOCK_M queries of one head.
struct QueryBlock {
  unsigned batch, head, key_head;
  int64_t first_row;  // index of the head's first query among all (batch, head, query)
  Range queries;

  // Blocks are numbered by head, then in descending order of rows: with a causal mask the last rows have the most keys.
  __device__ __forceinline__ QueryBlock(const Problem& p, int64_t index, int block_m) {
    const int blocks = static_cast<int>(ceil_div(p.queries, block_m));
    const auto batch_head = static_cast<unsigned>(index / blocks);
    const int first = (blocks - 1 - static_cast<int>(index % blocks)) * block_m;
    const auto heads = static_cast<unsigned>(p.heads);
    batch = batch_head / heads, head = batch_head % heads;
    key_head = head / (heads / static_cast<unsigned>(p.key_heads));
    first_row = static_cast<int64_t>(batch_head) * p.queries;
    queries = {first, first + block_m < p.queries ? first + block_m : p.queries};
  }
  __device__ __forceinline__ int rows() const { return queries.end - queries.begin; }
};

// The key tiles of a QueryBlock, BLOCK_N keys each. There is always a first one, even if no key is visible.
template <typename T, int BLOCK_N, bool kPlain>
struct KeyTiles {
  struct Index {
    int tile;
    LiveBits<BLOCK_N> live;  // keys that exist and are not excluded for all queries

    __device__ __forceinline__ int key() const { return tile * BLOCK_N; }
    __device__ __forceinline__ bool is_live(int row) const { return (live >> row & 1) != 0; }
  };
  Range keys;
  HeadMask<T> mask;
  int first_tile, end_tile;

  __device__ __forceinline__ KeyTiles(const Problem& p, const QueryBlock& block)
      : keys(keys_in_window(p, block.queries)), mask(p.mask, block.batch, block.head) {
    first_tile = keys.begin / BLOCK_N;
    end_tile = keys.empty() ? 0 : (keys.end + BLOCK_N - 1) / BLOCK_N;
  }
  __device__ __forceinline__ bool has_first() const { return true; }
  __device__ __forceinline__ Index first() const {
    const Index index = find(first_tile);
    return index.tile < end_tile ? index : Index{first_tile, 0};
  }
  __device__ __forceinline__ Index next(const Index& index) const { return find(index.tile + 1); }
  __device__ __forceinline__ bool contains(const Index& index) const { return index.tile < end_tile; }

  // Whether every query of the block attends to every key of the tile, so that no mask has to be applied.
  __device__ __forceinline__ bool is_unmasked(const Problem& p, const QueryBlock& block, const Index& index) const {
    return index.live == full<BLOCK_N>() && window_covers(p, block.queries, {index.key(), index.key() + BLOCK_N}) &&
           (kPlain || mask.kind == MaskKind::kNone || (mask.kind == MaskKind::kBool && mask.is_per_key()));
  }

 private:
  // The first tile from ``tile`` on with a live key.
  __device__ __forceinline__ Index find(int tile) const {
    for (; tile < end_tile; ++tile) {
      const auto live = mask.template live<BLOCK_N, kPlain>(keys, tile * BLOCK_N);
      if (live != 0) return {tile, live};
    }
    return {end_tile, 0};
  }
};

// BLOCK_N keys of one key head.
struct KeyBlock {
  int batch, key_head;
  Range keys;

  __device__ __forceinline__ KeyBlock(const Problem& p, int64_t index, int block_n) {
    const int blocks = static_cast<int>(ceil_div(p.keys, block_n)), batch_head = static_cast<int>(index / blocks);
    const int first = static_cast<int>(index % blocks) * block_n;
    batch = batch_head / p.key_heads, key_head = batch_head % p.key_heads;
    keys = {first, first + block_n < p.keys ? first + block_n : p.keys};
  }
};

// The query tiles of a KeyBlock, BLOCK_M queries each, for each head of the group. There may be none.
template <int BLOCK_M>
struct QueryTiles {
  using Index = int;
  int first_tile, tiles_per_head, group_size, first_head, count;

  // kBlockN: the maximum number of keys of the block. Called by whole warps.
  template <typename T, int kBlockN, bool kPlain>
  static __device__ __forceinline__ QueryTiles make(const Problem& p, const KeyBlock& block) {
    QueryTiles tiles;
    tiles.group_size = p.heads / p.key_heads;
    const Range queries = queries_in_window(p, block.keys);
    tiles.first_head = block.key_head * tiles.group_size;
    tiles.first_tile = queries.begin / BLOCK_M;
    tiles.tiles_per_head = queries.empty() ? 0 : (queries.end + BLOCK_M - 1) / BLOCK_M - tiles.first_tile;
    tiles.count = tiles.tiles_per_head * tiles.group_size;
    if constexpr (!kPlain) {
      // None if the mask excludes all keys of the block for all queries.
      const HeadMask<T> mask(p.mask, block.batch, tiles.first_head);
      const bool shared_by_heads = tiles.group_size == 1 || p.mask.head == 0;
      if (shared_by_heads && mask.template live<kBlockN, false>(block.keys, block.keys.begin) == 0) tiles.count = 0;
    }
    return tiles;
  }
  __device__ __forceinline__ bool has_first() const { return count > 0; }
  __device__ __forceinline__ Index first() const { return 0; }
  __device__ __forceinline__ Index next(Index index) const { return index + 1; }
  __device__ __forceinline__ bool contains(Index index) const { return index < count; }

  __device__ __forceinline__ int head(Index index) const { return first_head + index / tiles_per_head; }
  __device__ __forceinline__ int query(Index index) const { return (first_tile + index % tiles_per_head) * BLOCK_M; }
  __device__ __forceinline__ Range queries(const Problem& p, Index index) const {
    const int first = query(index);
    return {first, first + BLOCK_M < p.queries ? first + BLOCK_M : p.queries};
  }

  // Whether every query of a full tile attends to each of ``block_n`` keys, as far as the window is concerned.
  __device__ __forceinline__ bool is_unmasked(const Problem& p, const KeyBlock& block, Index index, int block_n) const {
    const Range tile = queries(p, index);
    return tile.end - tile.begin == BLOCK_M && block.keys.end - block.keys.begin == block_n &&
           window_covers(p, tile, block.keys);
  }
};

}  // namespace fastgen::attention
