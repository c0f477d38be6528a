// Masking of packed rows: each has its own head, query and window (decode_scheduler.cuh).
#pragma once

#include <cfloat>

#include "attention/decode_tiles.h"
#include "attention/mask.cuh"

namespace fastgen::attention {

// One row of a mask. T: the query's storage type.
template <typename T>
class MaskRow {
 public:
  __device__ __forceinline__ MaskRow(const Mask& mask, unsigned batch, int head, int query) {
    const int size = mask.kind == MaskKind::kBool ? 1 : mask.kind == MaskKind::kFloat32 ? 4 : int{sizeof(T)};
    data_ = static_cast<const unsigned char*>(mask.data) +
            (batch * mask.batch + head * mask.head + query * mask.query) * size;
  }
  __device__ __forceinline__ bool allows(const Mask& mask, int key) const { return data_[key * mask.key] != 0; }
  // What a float mask adds to a score, in units of log2. -inf only where the mask is -inf: the lowest finite floats,
  // which are common in masks, must not overflow to it.
  __device__ __forceinline__ float term(const Mask& mask, int key) const {
    const int64_t at = key * mask.key;
    const float added = mask.kind == MaskKind::kFloat32 ? reinterpret_cast<const float*>(data_)[at]
                                                        : device::to_float(reinterpret_cast<const T*>(data_)[at]);
    const float scaled = kLog2e * added;
    return scaled == -INFINITY && added > -INFINITY ? -FLT_MAX : scaled;
  }

 private:
  const unsigned char* data_;
};

__device__ __forceinline__ bool is_float(const Mask& mask) {
  return mask.kind != MaskKind::kNone && mask.kind != MaskKind::kBool;
}

// The bits of BLOCK_N keys from ``first`` on that are in the range.
template <int BLOCK_N>
__device__ __forceinline__ uint32_t bits_of(Range keys, int first) {
  const int begin = keys.begin > first ? keys.begin - first : 0;
  const int end = keys.end - first < BLOCK_N ? keys.end - first : BLOCK_N;
  return end <= begin ? 0 : ~0u >> (32 - (end - begin)) << begin;
}

// The two rows of a lane.
template <typename T, int BLOCK_N>
struct PackedMask {
  static constexpr int kTiles = BLOCK_N / 8;
  using Scores = float[1][kTiles][4];
  MaskRow<T> rows[2];
  Range windows[2];

  // Bits of the lane's scores of a tile: bit 4 tile + i is that of fragment [tile][i]. ``live``: the bits of its keys.
  // Boolean masks are applied here unless ``is_applied``, float masks in ``apply``.
  __device__ __forceinline__ uint32_t visible(const Mask& mask, int key, uint32_t live, bool is_applied) const {
    const uint32_t of_rows[2] = {live & bits_of<BLOCK_N>(windows[0], key), live & bits_of<BLOCK_N>(windows[1], key)};
    const bool has_entries = mask.kind == MaskKind::kBool && !is_applied;
    uint32_t bits = 0;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int across = tile * 8 + lane_column() + i % 2;
        bool is_visible = (of_rows[i / 2] >> across & 1) != 0;
        if (has_entries && is_visible) is_visible = rows[i / 2].allows(mask, key + across);
        bits |= (is_visible ? 1u : 0u) << (tile * 4 + i);
      }
    }
    return bits;
  }

  // scores = scale * scores + float mask, -inf where masked. An entry of -inf clears the bit as well. ``masked``:
  // whether there is a float mask to be read, if the call has one.
  __device__ __forceinline__ void apply(const Mask& mask, Scores& scores, float scale, uint32_t& visible, int key,
                                        bool masked) const {
    const bool has_entries = masked && is_float(mask);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t bit = 1u << (tile * 4 + i);
        float term = (visible & bit) != 0 ? 0.0f : -INFINITY;
        if (has_entries && term == 0.0f) {
          term = rows[i / 2].term(mask, key + tile * 8 + lane_column() + i % 2);
          if (term == -INFINITY) visible &= ~bit;
        }
        float& score = scores[0][tile][i];
        score = term == -INFINITY ? -INFINITY : score * scale + term;
      }
    }
  }

  // Bits 2 tile and 2 tile + 1: whether any row attends to this lane's columns of the tile.
  static __device__ __forceinline__ uint32_t columns(uint32_t visible) {
    uint32_t found = 0;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint32_t four = visible >> (tile * 4) & 15u;
      found |= ((four | four >> 2) & 3u) << (2 * tile);
    }
    for (int lanes = 4; lanes < 32; lanes *= 2) found |= device::shuffle_xor(found, lanes);
    return found;
  }
};

}  // namespace fastgen::attention
