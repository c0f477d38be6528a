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

// Rows of a packed sequence. Positions are clipped, so that none of them leads out of an operand.
__device__ __forceinline__ Range sequence_rows(const int32_t* begins, int sequence, int rows) {
  return clipped(begins[sequence], begins[sequence + 1], rows);
}

// The tile's sequence, its rows, ``own`` and the other operand's, and the first row of the tile in it.
struct SequenceTile {
  Range own, other;
  int number, first;

  __device__ __forceinline__ SequenceTile(int count, const int32_t* own_begins, int own_rows,
                                          const int32_t* other_begins, int other_rows, int size, int tile) {
    int sequence = 0;
    for (int last = count - 1; sequence < last;) {  // the last sequence whose first tile is at most ``tile``
      const int middle = (sequence + last + 1) / 2;
      if (own_begins[middle] / size + middle <= tile) {
        sequence = middle;
      } else {
        last = middle - 1;
      }
    }
    number = sequence;
    own = sequence_rows(own_begins, sequence, own_rows);
    other = sequence_rows(other_begins, sequence, other_rows);
    const int tile_in_sequence = tile - own_begins[sequence] / size - sequence;
    first = tile_in_sequence < 0 ? 0 : tile_in_sequence * size;
  }
};

// Whether a kernel takes packed sequences. One that does not has no registers for them.
template <bool kMayPack>
using MayPack = std::bool_constant<kMayPack>;

// BLOCK_M queries of one head. There may be none in packed sequences.
struct QueryBlock {
  unsigned batch, key_batch, head, key_head;
  int64_t first_row;  // index of the sequence's first query among all (batch, head, query)
  Range queries;
  int all_keys;  // of the sequence

  // Blocks are numbered by head, then in descending order of rows: with a causal mask the last rows have the most keys.
  // ``index`` has 32 bits: a division of 64 bits takes twice as many instructions.
  template <bool kMayPack>
  __device__ __forceinline__ QueryBlock(const Problem& p, unsigned index, int block_m, MayPack<kMayPack>) {
    const unsigned blocks = tiles_of_head_32(p.queries, block_m, kMayPack ? p.sequences.count : 0);
    const unsigned batch_head = index / blocks;
    const int tile = static_cast<int>(blocks - 1 - index % blocks);
    const auto heads = static_cast<unsigned>(p.heads);
    batch = key_batch = batch_head / heads, head = batch_head % heads;
    key_head = head / (heads / static_cast<unsigned>(p.key_heads));
    int first = tile * block_m, all = p.queries;
    all_keys = p.keys;
    first_row = static_cast<int64_t>(batch_head) * p.queries;
    if (kMayPack && p.sequences.count > 0) {
      const SequenceTile sequence(p.sequences.count, p.sequences.queries, p.queries, p.sequences.keys, p.keys, block_m,
                                  tile);
      batch = static_cast<unsigned>(sequence.own.begin), key_batch = static_cast<unsigned>(sequence.other.begin);
      first = sequence.first, all = sequence.own.end - sequence.own.begin;
      all_keys = sequence.other.end - sequence.other.begin;
      first_row += batch;
    }
    queries = {first, first + block_m < all ? first + block_m : all};
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
    __device__ __forceinline__ bool all_live() const { return live == full<BLOCK_N>(); }
  };
  Range keys;
  HeadMask<T> mask;
  int first_tile, end_tile;

  __device__ __forceinline__ KeyTiles(const Problem& p, const QueryBlock& block)
      : keys(keys_in_window(p, block.queries, block.all_keys)), mask(p.mask, block.batch, block.head) {
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

  // Whether something has to be masked in the scores of the tile with ``rows`` queries, which see ``band`` of it.
  __device__ __forceinline__ bool is_masked(const Index& index, const Band& band, int rows) const {
    return !index.all_live() || !band.covers(rows, BLOCK_N) || (!kPlain && mask.has_entries());
  }

 private:
  // The first tile from ``tile`` on with a live key.
  __device__ __forceinline__ Index find(int tile) const {
    if constexpr (kPlain) return {tile, mask.template live<BLOCK_N, true>(keys, tile * BLOCK_N)};  // all have one
    for (; tile < end_tile; ++tile) {
      const auto live = mask.template live<BLOCK_N, kPlain>(keys, tile * BLOCK_N);
      if (live != 0) return {tile, live};
    }
    return {end_tile, 0};
  }
};

// BLOCK_N keys of one key head. There may be none in packed sequences. What their positions give is read again where it
// is needed: kernels have no registers for it.
template <bool kMayPack>
struct KeyBlock {
  int place;  // the batch entry, or the sequence
  int key_head;
  Range keys;

  __device__ __forceinline__ KeyBlock(const Problem& p, unsigned index, int block_n) {
    const unsigned blocks = tiles_of_head_32(p.keys, block_n, kMayPack ? p.sequences.count : 0);
    const unsigned batch_head = index / blocks, key_heads = static_cast<unsigned>(p.key_heads);
    const int tile = static_cast<int>(index % blocks);
    place = static_cast<int>(batch_head / key_heads), key_head = static_cast<int>(batch_head % key_heads);
    int first = tile * block_n, all = p.keys;
    if (is_packed(p)) {
      const SequenceTile sequence(p.sequences.count, p.sequences.keys, p.keys, p.sequences.queries, p.queries, block_n,
                                  tile);
      place = sequence.number, first = sequence.first, all = sequence.own.end - sequence.own.begin;
    }
    keys = {first, first + block_n < all ? first + block_n : all};
  }
  __device__ __forceinline__ static bool is_packed(const Problem& p) { return kMayPack && p.sequences.count > 0; }
  // The batch index of key, value and their gradients, and that of query, dO and rows; of packed ones their first row.
  __device__ __forceinline__ int batch(const Problem& p) const {
    return is_packed(p) ? sequence_rows(p.sequences.keys, place, p.keys).begin : place;
  }
  __device__ __forceinline__ int query_batch(const Problem& p) const {
    return is_packed(p) ? sequence_rows(p.sequences.queries, place, p.queries).begin : place;
  }
  // The queries of the sequence.
  __device__ __forceinline__ int all_queries(const Problem& p) const {
    if (!is_packed(p)) return p.queries;
    const Range rows = sequence_rows(p.sequences.queries, place, p.queries);
    return rows.end - rows.begin;
  }
  // Index of the first query of a head among all (batch, head, query).
  __device__ __forceinline__ int64_t first_row(const Problem& p, int head) const {
    if (is_packed(p)) return query_batch(p) + static_cast<int64_t>(head) * p.queries;
    return (static_cast<int64_t>(place) * p.heads + head) * p.queries;
  }
};

// The query tiles of a KeyBlock, BLOCK_M queries each, for each head of the group. There may be none.
template <int BLOCK_M>
struct QueryTiles {
  struct Index {
    int head, tile;  // of the group, of the head
  };
  int first_tile, tiles_per_head, group_size, first_head;

  // kBlockN: the maximum number of keys of the block. Called by whole warps.
  template <typename T, int kBlockN, bool kPlain, bool kMayPack>
  static __device__ __forceinline__ QueryTiles make(const Problem& p, const KeyBlock<kMayPack>& block) {
    QueryTiles tiles;
    tiles.group_size = p.heads / p.key_heads;
    const Range queries = queries_in_window(p, block.keys, block.all_queries(p));
    tiles.first_head = block.key_head * tiles.group_size;
    tiles.first_tile = queries.begin / BLOCK_M;
    tiles.tiles_per_head = queries.empty() ? 0 : (queries.end + BLOCK_M - 1) / BLOCK_M - tiles.first_tile;
    if constexpr (!kPlain) {
      // None if the mask excludes all keys of the block for all queries.
      const HeadMask<T> mask(p.mask, block.batch(p), tiles.first_head);
      const bool shared_by_heads = tiles.group_size == 1 || p.mask.head == 0;
      if (shared_by_heads && mask.template live<kBlockN, false>(block.keys, block.keys.begin) == 0) {
        tiles.tiles_per_head = 0;
      }
    }
    return tiles;
  }
  __device__ __forceinline__ bool has_first() const { return tiles_per_head > 0 && group_size > 0; }
  __device__ __forceinline__ Index first() const { return {0, 0}; }
  __device__ __forceinline__ Index next(const Index& index) const {
    const bool last = index.tile + 1 == tiles_per_head;
    return {index.head + (last ? 1 : 0), last ? 0 : index.tile + 1};
  }
  __device__ __forceinline__ bool contains(const Index& index) const { return index.head < group_size; }

  __device__ __forceinline__ int head(const Index& index) const { return first_head + index.head; }
  __device__ __forceinline__ int query(const Index& index) const { return (first_tile + index.tile) * BLOCK_M; }
  // From row 0 of first_head to the tile's first row.
  __device__ __forceinline__ int64_t offset(const Operand& operand, const Index& index) const {
    return static_cast<unsigned>(index.head) * operand.head + static_cast<unsigned>(query(index)) * operand.row;
  }
  template <bool kMayPack>
  __device__ __forceinline__ Range queries(const Problem& p, const KeyBlock<kMayPack>& block,
                                           const Index& index) const {
    const int first = query(index), all = block.all_queries(p);
    return {first, first + BLOCK_M < all ? first + BLOCK_M : all};
  }
};

}  // namespace fastgen::attention
