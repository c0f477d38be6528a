// Masking: sequence length, window, and the boolean or float mask of the call.
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "attention/params.h"
#include "attention/tile.cuh"
#include "device/bits.cuh"
#include "device/warp.cuh"

namespace fastgen::attention {

// Scores are in units of log2, so that weights are computed with exp2.
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

struct Range {
  int begin, end;

  __device__ __forceinline__ bool empty() const { return end <= begin; }
};

__device__ __forceinline__ Range clipped(int64_t begin, int64_t end, int size) {
  begin = begin < 0 ? 0 : begin < size ? begin : size;
  end = end < size ? end : size;
  return {static_cast<int>(begin), static_cast<int>(end < begin ? begin : end)};
}

// The keys in the window of at least one query of the range, and the queries whose window contains a key of it; ``all``
// is their number.
__device__ __forceinline__ Range keys_in_window(const Problem& p, Range queries, int all) {
  return clipped(p.window_left == kUnbounded ? 0 : int64_t{queries.begin} - p.window_left,
                 p.window_right == kUnbounded ? all : int64_t{queries.end} + p.window_right, all);
}
__device__ __forceinline__ Range queries_in_window(const Problem& p, Range keys, int all) {
  return clipped(p.window_right == kUnbounded ? 0 : int64_t{keys.begin} - p.window_right,
                 p.window_left == kUnbounded ? all : int64_t{keys.end} + p.window_left, all);
}

// The window in a fragment of scores: row r contains the columns low + r ... high + r. Saturated, so that sums
// with rows and columns of a tile do not overflow: kMargin is more than either.
struct Band {
  static constexpr int kMargin = 64;
  int low, high;

  // kTransposed: rows are keys and columns queries. ``row``: the first row of the fragment; columns count from 0.
  template <bool kTransposed>
  static __device__ __forceinline__ Band of(const Problem& p, int row) {
    const int left = kTransposed ? p.window_right : p.window_left, right = kTransposed ? p.window_left : p.window_right;
    return {left == kUnbounded ? -kMargin : saturated(int64_t{row} - left),
            right == kUnbounded ? INT32_MAX - kMargin : saturated(int64_t{row} + right)};
  }
  // The same for columns that count from ``column``.
  __device__ __forceinline__ Band from(int column) const { return {low - column, high - column}; }
  // Whether each of the first ``rows`` rows contains each of the first ``columns`` columns, and whether none does any.
  __device__ __forceinline__ bool covers(int rows, int columns) const {
    return low + rows - 1 <= 0 && high >= columns - 1;
  }
  __device__ __forceinline__ bool contains(int row, int column) const {
    return column >= low + row && column <= high + row;
  }
  __device__ __forceinline__ bool misses(int rows, int columns) const { return low >= columns || high + rows - 1 < 0; }

 private:
  static __device__ __forceinline__ int saturated(int64_t bound) {
    return static_cast<int>(bound < -kMargin ? -kMargin : bound > INT32_MAX - kMargin ? INT32_MAX - kMargin : bound);
  }
};

// One bit for each of kCount <= 64 rows or columns.
template <int kCount>
using LiveBits = std::conditional_t<kCount <= 32, uint32_t, uint64_t>;
template <int kCount>
FASTGEN_HOST_DEVICE constexpr LiveBits<kCount> full() {
  return static_cast<LiveBits<kCount>>(~uint64_t{0} >> (64 - kCount));
}

// The mask of one head. T: the query's storage type.
template <typename T>
struct HeadMask {
  const unsigned char* data;
  MaskKind kind;
  int64_t query, key;  // strides

  __device__ __forceinline__ HeadMask(const Mask& mask, unsigned batch, unsigned head)
      : kind(mask.kind), query(mask.query), key(mask.key) {
    const int size = kind == MaskKind::kBool ? 1 : kind == MaskKind::kFloat32 ? 4 : static_cast<int>(sizeof(T));
    data = static_cast<const unsigned char*>(mask.data) + (batch * mask.batch + head * mask.head) * size;
  }

  __device__ __forceinline__ bool is_float() const { return kind != MaskKind::kNone && kind != MaskKind::kBool; }
  // A key padding mask: the same for all queries.
  __device__ __forceinline__ bool is_per_key() const { return kind != MaskKind::kNone && query == 0; }

  // Whether there is more to apply to a score than the bits of live(): a float, or a bit of its own.
  __device__ __forceinline__ bool has_entries() const { return is_float() || (kind == MaskKind::kBool && query != 0); }

  // Entry: the storage type of ``kind``.
  template <typename Entry>
  __device__ __forceinline__ const Entry* entry(int at_query, int at_key) const {
    return reinterpret_cast<const Entry*>(data) + (at_query * query + at_key * key);
  }
  // Calls body.operator()<Entry>() for a float mask.
  template <typename Body>
  __device__ __forceinline__ void with_float_entries(Body&& body) const {
    if constexpr (std::is_same_v<T, float>) {
      body.template operator()<float>();
    } else if (kind == MaskKind::kFloat32) {
      body.template operator()<float>();
    } else {
      body.template operator()<T>();
    }
  }

  // score + entry of a float mask, in units of log2. The lowest finite floats, which are common in masks, must not
  // overflow to -inf: that is for entries that exclude a key.
  static __device__ __forceinline__ float added(float score, float entry) {
    constexpr float kLowest = static_cast<float>(-FLT_MAX / (1.000001 * kLog2e));
    return fmaf(entry < kLowest ? kLowest : entry, kLog2e, score);
  }
  __device__ __forceinline__ bool excludes(int at_query, int at_key) const {
    if (kind == MaskKind::kBool) return *entry<unsigned char>(at_query, at_key) == 0;
    const float added =
        kind == MaskKind::kFloat32 ? *entry<float>(at_query, at_key) : device::to_float(*entry<T>(at_query, at_key));
    return added == -INFINITY;
  }

  // Bit i: key first + i is in the range and not excluded by a per-key mask. Called by whole warps.
  template <int kCount, bool kPlain>
  __device__ __forceinline__ LiveBits<kCount> live(Range keys, int first) const {
    const int begin = keys.begin > first ? keys.begin - first : 0;
    const int end = keys.end - first < kCount ? keys.end - first : kCount;
    if (end <= begin) return 0;
    if (kPlain && end - begin == kCount) return full<kCount>();
    LiveBits<kCount> bits = full<kCount>() >> (kCount - (end - begin)) << begin;
    if constexpr (!kPlain) {
      if (is_per_key()) {
        LiveBits<kCount> allowed = 0;
#pragma unroll
        for (int part = 0; part < kCount; part += 32) {
          const int at = part + static_cast<int>(threadIdx.x % 32);
          const bool in_range = at < kCount && (bits >> at & 1) != 0;
          allowed |= LiveBits<kCount>{device::ballot(in_range && !excludes(0, first + at))} << part;
        }
        bits &= allowed;
      }
    }
    return bits;
  }
};

// Which scores of a lane's part of a fragment are unmasked. words[m][half]: those of row m * 16 + half * 8 + g, one bit
// per column from the lane's first on. Fragment element [m][tile][i] is bit 8 (tile % 4) + i % 2 of word tile / 4, and
// the other bits have no meaning.
template <int kFragments, int kTiles>
struct Visible {
  static constexpr int kWords = (kTiles + 3) / 4;
  static constexpr uint32_t kUsed = 0x03030303u >> (kTiles < 4 ? 32 - 8 * kTiles : 0);
  uint32_t words[kFragments][2][kWords];

  static __device__ __forceinline__ uint32_t bit(int tile, int i) { return 1u << (tile % 4 * 8 + i % 2); }
  __device__ __forceinline__ bool at(int m, int tile, int i) const {
    return (words[m][i / 2][tile / 4] & bit(tile, i)) != 0;
  }
  __device__ __forceinline__ void clear(int m, int tile, int i, bool masked) {
    words[m][i / 2][tile / 4] &= ~(masked ? bit(tile, i) : 0u);
  }

  __device__ __forceinline__ bool any() const {
    uint32_t found = 0;
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
#pragma unroll
      for (int word = 0; word < kWords; ++word) found |= words[m][0][word] | words[m][1][word];
    }
    return (found & kUsed) != 0;
  }

  // Bits 2 tile and 2 tile + 1: whether any row of the warp attends to this lane's columns of the tile. Also set for
  // columns that are not ``live``, which are zeros in shared memory.
  __device__ __forceinline__ uint32_t columns(LiveBits<8 * kTiles> live) const {
    uint32_t found = 0;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      uint32_t any_row = ~(static_cast<uint32_t>(live >> (32 * word)) >> lane_column());
#pragma unroll
      for (int m = 0; m < kFragments; ++m) any_row |= words[m][0][word] | words[m][1][word];
      any_row &= kUsed;
      any_row |= any_row >> 6;
      any_row = (any_row & 15u) | (any_row >> 12 & 0xf0u);
      found |= any_row << (8 * word);
    }
    for (int lanes = 4; lanes < 32; lanes *= 2) found |= device::shuffle_xor(found, lanes);
    return found;
  }
};

// Visibility of a fragment whose columns count from ``band`` and have the bits ``live``, and of which ``rows`` rows
// exist. Masks other than those of live() are not applied.
template <int kFragments, int kTiles>
__device__ __forceinline__ Visible<kFragments, kTiles> visible_in(const Band& band, int rows,
                                                                  LiveBits<8 * kTiles> live) {
  Visible<kFragments, kTiles> result;
  const int low = band.low + lane_row() - lane_column(), high = band.high + lane_row() - lane_column();
#pragma unroll
  for (int word = 0; word < Visible<kFragments, kTiles>::kWords; ++word) {
    const uint32_t columns = static_cast<uint32_t>(live >> (32 * word)) >> lane_column();
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int down = m * kFragmentRows + half * 8, before = low + down - 32 * word;
        const int after = 31 - (high + down - 32 * word);
        const uint32_t bits = columns & device::shift_left(~0u, static_cast<uint32_t>(before > 0 ? before : 0)) &
                              device::shift_right(~0u, static_cast<uint32_t>(after > 0 ? after : 0));
        result.words[m][half][word] = down + lane_row() < rows ? bits : 0u;
      }
    }
  }
  return result;
}

// Calls body(m, tile, i, entry) for each element of a fragment at (row, column), with the address of its entry in the
// mask, which may be out of bounds where the element is not visible.
template <typename Entry, bool kTransposed, int kFragments, int kTiles, typename T, typename Body>
__device__ __forceinline__ void for_entries(const HeadMask<T>& mask, int row, int column, Body&& body) {
  constexpr int kSize = sizeof(Entry);
  const int64_t down = kSize * (kTransposed ? mask.key : mask.query);
  const int64_t across = kSize * (kTransposed ? mask.query : mask.key);
  const int first_row = row + lane_row(), first_column = column + lane_column();
  const unsigned char* first = mask.data + first_row * down + first_column * across;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned char* entry = first + i * across;
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          body(m, tile, 2 * half + i, reinterpret_cast<const Entry*>(entry));
          entry += 8 * down;
        }
      }
    }
    first += 8 * across;
  }
}

// Visibility of a fragment at (row, column), of which ``rows`` rows exist. kTransposed: rows are keys, columns queries.
// ``live``: one bit per column. Boolean masks are applied here, float masks in mask_scores.
template <bool kPlain, bool kTransposed, int kFragments, int kTiles, typename T>
__device__ __forceinline__ Visible<kFragments, kTiles> visible_scores(const Band& band, const HeadMask<T>& mask,
                                                                      int row, int rows, int column,
                                                                      LiveBits<8 * kTiles> live) {
  auto result = visible_in<kFragments, kTiles>(band, rows, live);
  if constexpr (!kPlain) {
    // Keys that a per-key mask excludes are not live.
    if (mask.kind == MaskKind::kBool && (kTransposed || !mask.is_per_key())) {
      Visible<kFragments, kTiles> allowed = {};
      for_entries<unsigned char, kTransposed, kFragments, kTiles>(
          mask, row, column, [&](int m, int tile, int i, const unsigned char* entry) {
            unsigned char found = 0;
            if (result.at(m, tile, i)) found = *entry;
            allowed.words[m][i / 2][tile / 4] |= found != 0 ? result.bit(tile, i) : 0u;
          });
      result = allowed;
    }
  }
  return result;
}

// scores = score where visible, else -inf.
template <int kFragments, int kTiles>
__device__ __forceinline__ void hide_scores(float (&scores)[kFragments][kTiles][4],
                                            const Visible<kFragments, kTiles>& visible) {
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[m][tile][i] = visible.at(m, tile, i) ? scores[m][tile][i] : -INFINITY;
    }
  }
}

// Adds a float mask to the visible scores. An entry of -inf hides the score as well.
template <bool kTransposed, int kFragments, int kTiles, typename T>
__device__ __forceinline__ void add_mask(float (&scores)[kFragments][kTiles][4], Visible<kFragments, kTiles>& visible,
                                         const HeadMask<T>& mask, int row, int column) {
  mask.with_float_entries([&]<typename Entry>() {
    for_entries<Entry, kTransposed, kFragments, kTiles>(mask, row, column,
                                                        [&](int m, int tile, int i, const Entry* entry) {
                                                          Entry found = {};
                                                          if (visible.at(m, tile, i)) found = *entry;
                                                          const float added = device::to_float(found);
                                                          visible.clear(m, tile, i, added == -INFINITY);
                                                          scores[m][tile][i] = mask.added(scores[m][tile][i], added);
                                                        });
  });
}

// Masks the products q.k, where ``masked`` says that this has to be done, and adds a float mask. Returns the factor by
// which the results have to be multiplied to be scores in units of log2: it is positive, so that it may be applied
// after the maximum of a row is found, in one multiply-add with what is subtracted. ``scale``: that of the products.
template <bool kPlain, bool kTransposed, int kFragments, int kTiles, typename T>
__device__ __forceinline__ float mask_scores(float (&scores)[kFragments][kTiles][4], float scale, bool masked,
                                             Visible<kFragments, kTiles>& visible, const HeadMask<T>& mask, int row,
                                             int column) {
  if (!(scale > 0.0f) || (!kPlain && mask.is_float())) {
#pragma unroll
    for (auto& fragment : scores) {
#pragma unroll
      for (auto& tile : fragment) {
#pragma unroll
        for (float& score : tile) score *= scale;
      }
    }
    scale = 1.0f;
  }
  if (masked) {
    if constexpr (!kPlain) {
      if (mask.is_float()) add_mask<kTransposed>(scores, visible, mask, row, column);
    }
    hide_scores(scores, visible);
  }
  return scale;
}

}  // namespace fastgen::attention
