// What a block of the decode kernel owns, and the key tiles of its warps.
//
// The heads that share a key head are packed into rows: row r of a key head is query r % N of head r / N of its group.
// Key tiles are dealt out to the warps of all splits in turn, so that a cache that is filled in part occupies all of
// them: warp w of split s takes tiles s * warps + w, and every (splits * warps)-th after it.
#pragma once

#include "attention/decode_mask.cuh"
#include "attention/scheduler.cuh"

namespace fastgen::attention {

// Up to kDecodeRows rows of one key head.
struct DecodeBlock {
  unsigned batch, key_head;
  int group;  // heads that share the key head
  int first, rows;

  __device__ __forceinline__ DecodeBlock(const Problem& p, unsigned index) {
    group = p.heads / p.key_heads;
    const int all = group * p.queries, tiles = (all + kDecodeRows - 1) / kDecodeRows;
    const unsigned batch_head = index / tiles;
    batch = batch_head / p.key_heads, key_head = batch_head % p.key_heads;
    first = static_cast<int>(index % tiles) * kDecodeRows;
    rows = all - first < kDecodeRows ? all - first : kDecodeRows;
  }
};

// A row of the block. Rows beyond the last are equal to it.
struct PackedRow {
  int head, query;

  __device__ __forceinline__ PackedRow(const Problem& p, const DecodeBlock& block, int row) {
    const int at = block.first + (row < block.rows ? row : block.rows - 1);
    head = static_cast<int>(block.key_head) * block.group + at / p.queries, query = at % p.queries;
  }
  // Among all (batch, head, query).
  __device__ __forceinline__ int64_t index(const Problem& p, const DecodeBlock& block) const {
    return (int64_t{block.batch} * p.heads + head) * p.queries + query;
  }
};

// The tiles of a warp, BLOCK_N keys each, in ascending order; those without a live key are left out. Called by whole
// warps.
template <typename T, int BLOCK_N>
class WarpTiles {
 public:
  struct Index {
    int tile;       // -1: none
    uint32_t live;  // keys that exist and are not excluded for all rows

    __device__ __forceinline__ bool exists() const { return tile >= 0; }
    __device__ __forceinline__ int key() const { return tile * BLOCK_N; }
  };

  // ``unit`` of ``units``: the warp among those of all splits.
  __device__ __forceinline__ WarpTiles(const Problem& p, const DecodeBlock& block, int unit, int units)
      : keys_(keys_in_window(p, {0, p.queries}, p.keys)),
        covered_{keys_in_window(p, {p.queries - 1, p.queries}, p.keys).begin, keys_in_window(p, {0, 1}, p.keys).end},
        mask_(p.mask),
        row_(p.mask, block.batch, block.key_head * block.group, 0),
        is_shared_(mask_.kind != MaskKind::kNone && mask_.query == 0 && (block.group == 1 || mask_.head == 0)),
        first_(keys_.begin / BLOCK_N + unit),
        end_(keys_.empty() ? 0 : (keys_.end - 1) / BLOCK_N + 1),
        step_(units) {
    if (first_ < end_) find_live();
  }

  // Whether the mask's exclusions are those of live keys.
  __device__ __forceinline__ bool is_mask_applied() const { return is_shared_ && mask_.kind == MaskKind::kBool; }
  // Whether every row attends to every key of a tile, so that no mask has to be applied.
  __device__ __forceinline__ bool is_unmasked(const Index& index) const {
    return index.live == full<BLOCK_N>() && index.key() >= covered_.begin && index.key() + BLOCK_N <= covered_.end &&
           (mask_.kind == MaskKind::kNone || is_mask_applied());
  }

  __device__ __forceinline__ Index next() {
    while (first_ < end_) {
      while (at_ < kBatch) {
        const int at = at_++;
        const uint32_t live = device::shuffle(live_, at);
        if (live != 0) return {first_ + at * step_, live};
      }
      first_ += kBatch * step_;
      if (first_ < end_) find_live();
    }
    return {-1, 0};
  }

 private:
  static_assert(BLOCK_N <= 32, "the live keys of a tile are the bits of a word, and a mask's entries a lane each");
  static constexpr int kBatch = 8;  // tiles whose masks are read together, so that the loads overlap

  // Bits of the tiles of the next batch, in its first lanes.
  __device__ __forceinline__ void find_live() {
    const int lane = threadIdx.x % 32, tile = first_ + lane * step_;
    at_ = 0;
    live_ = lane < kBatch && tile < end_ ? bits_of<BLOCK_N>(keys_, tile * BLOCK_N) : 0;
    if (is_mask_applied()) {
      exclude([&](int key) { return !row_.allows(mask_, key); });
    } else if (is_shared_) {
      exclude([&](int key) { return row_.term(mask_, key) == -INFINITY; });
    }
  }
  template <typename IsExcluded>
  __device__ __forceinline__ void exclude(IsExcluded&& is_excluded) {
    const int lane = threadIdx.x % 32;
    bool excluded[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      // Beyond the last key the entry is not used; in unsigned arithmetic, which does not overflow.
      const unsigned key = static_cast<unsigned>(first_ + i * step_) * BLOCK_N + lane;
      excluded[i] = is_excluded(key < static_cast<unsigned>(keys_.end) ? static_cast<int>(key) : keys_.end - 1);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const uint32_t bits = device::ballot(excluded[i]);
      if (lane == i) live_ &= ~bits;
    }
  }

  Range keys_, covered_;  // in the window of any row, and of all
  const Mask& mask_;
  MaskRow<T> row_;
  bool is_shared_;  // a mask that is the same for all rows
  int first_, end_, step_, at_ = 0;
  uint32_t live_ = 0;
};

}  // namespace fastgen::attention
