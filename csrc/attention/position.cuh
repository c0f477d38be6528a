// Where a block is, and the steps that it takes.
#pragma once

#include "attention/mask.cuh"

namespace fastgen::attention {

// The part of a tensor that belongs to a head, from a row on.
template <typename T>
__device__ __forceinline__ const T* rows_of(const Operand& operand, unsigned batch, unsigned head, unsigned row) {
  return static_cast<const T*>(operand.data) + batch * operand.batch + head * operand.head + row * operand.row;
}
template <typename T>
__device__ __forceinline__ T* rows_of(const Result& result, unsigned batch, unsigned head, unsigned row) {
  return static_cast<T*>(result.data) + batch * result.batch + head * result.head + row * result.row;
}

__device__ __forceinline__ const float* pointer(const RowInput& input, unsigned batch, unsigned head, unsigned row) {
  return input.data + batch * input.batch + head * input.head + row * input.row;
}
__device__ __forceinline__ float read(const RowInput& input, unsigned batch, unsigned head, unsigned row) {
  return *pointer(input, batch, head, row);
}

// Some queries of one head.
struct QueryTile {
  unsigned batch, head, key_head;  // unsigned: no sign to carry into 64 bits
  int64_t first_of_head;           // number of the head's first row among all
  Range queries;

  // Tiles are numbered by head, then by rows. Within a head the last come first: with a causal mask they see most.
  __device__ __forceinline__ QueryTile(const Problem& p, int64_t index, int rows) {
    const int tiles = static_cast<int>(ceil_div(p.queries, rows));
    const auto head_of_all = static_cast<unsigned>(index / tiles);
    const int first = (tiles - 1 - static_cast<int>(index % tiles)) * rows;
    const auto heads = static_cast<unsigned>(p.heads);
    batch = head_of_all / heads, head = head_of_all % heads;
    key_head = head / (heads / static_cast<unsigned>(p.key_heads));
    first_of_head = static_cast<int64_t>(head_of_all) * p.queries;
    queries = {first, first + rows < p.queries ? first + rows : p.queries};
  }
  __device__ __forceinline__ int count() const { return queries.end - queries.begin; }
};

// A tile that passes by: its number, and which of its rows are there and seen by someone.
template <int kSize>
struct Step {
  int index;
  LiveBits<kSize> live;
};

// The tiles of kSize keys that queries see. There is always a first, even where they see none.
template <typename T, int kSize, bool kPlain>
struct KeySteps {
  using Step = attention::Step<kSize>;
  Range keys;
  HeadMask<T> mask;
  int last;

  __device__ __forceinline__ KeySteps(const Problem& p, const QueryTile& at)
      : keys(keys_of(p, at.queries)), mask(p.mask, at.batch, at.head) {
    last = keys.empty() ? 0 : (keys.end + kSize - 1) / kSize;
  }
  __device__ __forceinline__ Step first() const {
    const Step step = from(keys.begin / kSize);
    return step.index < last ? step : Step{keys.begin / kSize, 0};
  }
  // The next tile that has a live key.
  __device__ __forceinline__ Step after(const Step& step) const { return from(step.index + 1); }
  __device__ __forceinline__ bool has(const Step& step) const { return step.index < last; }

  // Whether there is nothing to look at: every query sees every key.
  __device__ __forceinline__ bool all_visible(const Problem& p, const QueryTile& at, const Step& step) const {
    return step.live == full<kSize>() && sees_all(p, at.queries, {step.index * kSize, (step.index + 1) * kSize}) &&
           (kPlain || mask.kind == MaskKind::kNone || (mask.kind == MaskKind::kBool && mask.per_key()));
  }

 private:
  __device__ __forceinline__ Step from(int index) const {
    for (; index < last; ++index) {
      const auto live = mask.template live<kSize, kPlain>(keys, index * kSize);
      if (live != 0) return {index, live};
    }
    return {last, 0};
  }
};

// Some keys of one head.
struct KeyTile {
  int batch, key_head;
  Range keys;

  __device__ __forceinline__ KeyTile(const Problem& p, int64_t index, int rows) {
    const int tiles = static_cast<int>(ceil_div(p.keys, rows)), head_of_all = static_cast<int>(index / tiles);
    const int first = static_cast<int>(index % tiles) * rows;
    batch = head_of_all / p.key_heads, key_head = head_of_all % p.key_heads;
    keys = {first, first + rows < p.keys ? first + rows : p.keys};
  }
};

// The tiles of kSize queries that see keys, head by head of the group. There may be none.
template <int kSize>
struct QuerySteps {
  int first_tile, tiles_a_head, heads_a_key, first_head;

  __device__ __forceinline__ QuerySteps(const Problem& p, const KeyTile& at) : heads_a_key(p.heads / p.key_heads) {
    const Range seen_by = queries_of(p, at.keys);
    first_head = at.key_head * heads_a_key;
    first_tile = seen_by.begin / kSize;
    tiles_a_head = seen_by.empty() ? 0 : (seen_by.end + kSize - 1) / kSize - first_tile;
  }
  __device__ __forceinline__ int head(int step) const { return first_head + step / tiles_a_head; }
  __device__ __forceinline__ int query(int step) const { return (first_tile + step % tiles_a_head) * kSize; }
  __device__ __forceinline__ Range queries(const Problem& p, int step) const {
    const int first = query(step);
    return {first, first + kSize < p.queries ? first + kSize : p.queries};
  }

  // How many; none where the mask lets no query of the head see any of the keys, which are at most kRows. Whole warps
  // take part.
  template <typename T, int kRows, bool kPlain>
  __device__ __forceinline__ int count(const Problem& p, const KeyTile& at) const {
    if constexpr (!kPlain) {
      const HeadMask<T> mask(p.mask, at.batch, first_head);
      const bool for_all_heads = heads_a_key == 1 || p.mask.head == 0;
      if (for_all_heads && mask.template live<kRows, false>(at.keys, at.keys.begin) == 0) return 0;
    }
    return tiles_a_head * heads_a_key;
  }

  // Whether every query of the tile is there and, as far as the window goes, sees each of ``rows`` keys.
  __device__ __forceinline__ bool all_visible(const Problem& p, const KeyTile& at, int step, int rows) const {
    const Range of_step = queries(p, step);
    return of_step.end - of_step.begin == kSize && at.keys.end - at.keys.begin == rows && sees_all(p, of_step, at.keys);
  }
};

}  // namespace fastgen::attention
