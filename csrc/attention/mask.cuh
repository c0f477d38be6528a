// Masking: sequence length, window, and the boolean or float mask of the call.
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "attention/params.h"
#include "attention/tile.cuh"
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

// Whether the window of every query of a range contains every key of another.
__device__ __forceinline__ bool window_covers(const Problem& p, Range queries, Range keys) {
  return (p.window_left == kUnbounded || keys.begin >= int64_t{queries.end} - 1 - p.window_left) &&
         (p.window_right == kUnbounded || keys.end - 1 <= int64_t{queries.begin} + p.window_right);
}
__device__ __forceinline__ bool in_window(const Problem& p, int query, int key) {
  return (p.window_left == kUnbounded || key >= int64_t{query} - p.window_left) &&
         (p.window_right == kUnbounded || key <= int64_t{query} + p.window_right);
}

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

  // Boolean masks: whether the query attends to the key.
  __device__ __forceinline__ bool allows(int at_query, int at_key) const {
    return data[at_query * query + at_key * key] != 0;
  }
  // Float masks: the value that is added to the score.
  __device__ __forceinline__ float value(int at_query, int at_key) const {
    const int64_t at = at_query * query + at_key * key;
    return kind == MaskKind::kFloat32 ? reinterpret_cast<const float*>(data)[at]
                                      : device::to_float(reinterpret_cast<const T*>(data)[at]);
  }
  // The same in units of log2. -inf only where the mask is -inf: the lowest finite floats, which are common in masks,
  // must not overflow to it.
  __device__ __forceinline__ float term(int at_query, int at_key) const {
    const float added = value(at_query, at_key), scaled = kLog2e * added;
    return scaled == -INFINITY && added > -INFINITY ? -FLT_MAX : scaled;
  }
  __device__ __forceinline__ bool excludes(int at_query, int at_key) const {
    return kind == MaskKind::kBool ? !allows(at_query, at_key) : term(at_query, at_key) == -INFINITY;
  }

  // Bit i: key first + i is in the range and not excluded by a per-key mask. Called by whole warps.
  template <int kCount, bool kPlain>
  __device__ __forceinline__ LiveBits<kCount> live(Range keys, int first) const {
    const int begin = keys.begin > first ? keys.begin - first : 0;
    const int end = keys.end - first < kCount ? keys.end - first : kCount;
    if (end <= begin) return 0;
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

// The unmasked scores of a lane: bit (m * kTiles + tile) * 4 + i of fragment [m][tile][i].
template <int kFragments, int kTiles>
struct Visible {
  static constexpr int kScores = kFragments * kTiles * 4;
  using Bits = LiveBits<kScores>;
  Bits bits = full<kScores>();

  __device__ __forceinline__ bool at(int m, int tile, int i) const {
    return (bits >> ((m * kTiles + tile) * 4 + i) & 1) != 0;
  }
  __device__ __forceinline__ void clear(int m, int tile, int i) { bits &= ~(Bits{1} << ((m * kTiles + tile) * 4 + i)); }

  // Bits 2 tile and 2 tile + 1: whether any row of the warp attends to this lane's columns of the tile.
  __device__ __forceinline__ uint32_t columns() const {
    uint32_t found = 0;
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint32_t four = static_cast<uint32_t>(bits >> ((m * kTiles + tile) * 4)) & 15u;
        found |= ((four | four >> 2) & 3u) << (2 * tile);
      }
    }
    for (int lanes = 4; lanes < 32; lanes *= 2) found |= device::shuffle_xor(found, lanes);
    return found;
  }
};

// Visibility of a fragment at (row, column), of which ``rows`` rows exist. kTransposed: rows are keys, columns queries.
// ``live``: one bit per column. Boolean masks are applied here, float masks in mask_scores.
template <bool kPlain, bool kTransposed, int kFragments, int kTiles, typename T>
__device__ __forceinline__ Visible<kFragments, kTiles> visible_scores(const Problem& p, const HeadMask<T>& mask,
                                                                      int row, int rows, int column,
                                                                      LiveBits<8 * kTiles> live) {
  Visible<kFragments, kTiles> result;
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int down = m * kFragmentRows + i / 2 * 8 + lane_row(), across = tile * 8 + lane_column() + i % 2;
        const int query = kTransposed ? column + across : row + down;
        const int key = kTransposed ? row + down : column + across;
        bool visible = down < rows && (live >> across & 1) != 0 && in_window(p, query, key);
        if constexpr (!kPlain) {
          // Keys that a per-key mask excludes are not live.
          const bool has_entries = mask.kind == MaskKind::kBool && (kTransposed || !mask.is_per_key());
          if (has_entries && visible) visible = mask.allows(query, key);
        }
        if (!visible) result.clear(m, tile, i);
      }
    }
  }
  return result;
}

// score + float mask, -inf where masked: element i of fragment [m][tile].
template <bool kPlain, bool kTransposed, int kFragments, int kTiles, typename T>
__device__ __forceinline__ float masked_score(float score, Visible<kFragments, kTiles>& visible,
                                              const HeadMask<T>& mask, int m, int tile, int i, int row, int column) {
  if (!visible.at(m, tile, i)) return -INFINITY;
  if constexpr (!kPlain) {
    if (mask.is_float()) {
      const int down = row + m * kFragmentRows + i / 2 * 8 + lane_row();
      const int across = column + tile * 8 + lane_column() + i % 2;
      const float term = kTransposed ? mask.term(across, down) : mask.term(down, across);
      if (term == -INFINITY) visible.clear(m, tile, i);
      score = term == -INFINITY ? term : score + term;
    }
  }
  return score;
}

// scores = scale * scores + float mask, -inf where masked. An entry of -inf in the float mask clears the bit as well.
template <bool kPlain, bool kTransposed, int kFragments, int kTiles, typename T>
__device__ __forceinline__ void mask_scores(float (&scores)[kFragments][kTiles][4], float scale,
                                            Visible<kFragments, kTiles>& visible, const HeadMask<T>& mask, int row,
                                            int column) {
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[m][tile][i] =
            masked_score<kPlain, kTransposed>(scores[m][tile][i] * scale, visible, mask, m, tile, i, row, column);
      }
    }
  }
}

}  // namespace fastgen::attention
