// Tiles in shared memory of operands with their tangents, and the tangent of the scores:
//   W = scale * (Gq K^T + Q Gk^T) + Gb for tangents Gq, Gk and Gb of queries, keys and mask.
#pragma once

#include "attention/scheduler.cuh"

namespace fastgen::attention {

// Q, Gq and, with kValueDim > 0, dO.
template <typename T, int kKeyDim, int kValueDim>
struct QueryTangentTile {
  static constexpr int kKeyRow = row_bytes(kKeyDim, sizeof(T));
  static constexpr int kBytes = query_tangent_bytes({kKeyDim, kValueDim}, sizeof(T), kValueDim > 0);  // of a row
  unsigned char* data;
  int rows;

  __device__ __forceinline__ Tile<T, kKeyDim> query() const { return {reinterpret_cast<T*>(data)}; }
  __device__ __forceinline__ Tile<T, kKeyDim> tangent() const { return {reinterpret_cast<T*>(data + rows * kKeyRow)}; }
  __device__ __forceinline__ Tile<T, kValueDim> grad_out() const {
    return {reinterpret_cast<T*>(data + 2 * rows * kKeyRow)};
  }
};

// K, Gk and kColumns columns of V and Gv.
template <typename T, int kKeyDim, int kColumns>
struct KeyTangentTile {
  static constexpr int kKeyRow = row_bytes(kKeyDim, sizeof(T)), kValueRow = row_bytes(kColumns, sizeof(T));
  static constexpr int kBytes = key_tangent_bytes({kKeyDim, kColumns}, sizeof(T));  // of a row
  unsigned char* data;
  int rows;

  __device__ __forceinline__ Tile<T, kKeyDim> key() const { return {reinterpret_cast<T*>(data)}; }
  __device__ __forceinline__ Tile<T, kKeyDim> tangent_key() const {
    return {reinterpret_cast<T*>(data + rows * kKeyRow)};
  }
  __device__ __forceinline__ Tile<T, kColumns> value() const {
    return {reinterpret_cast<T*>(data + 2 * rows * kKeyRow)};
  }
  __device__ __forceinline__ Tile<T, kColumns> tangent_value() const {
    return {reinterpret_cast<T*>(data + rows * (2 * kKeyRow + kValueRow))};
  }
};

// Starts the asynchronous copy of the rows of a query tile from ``row`` on, or of a key tile. P: TangentParams or
// BackwardParams.
template <typename T, int kKeyDim, int kValueDim, typename P, typename IsValid>
__device__ __forceinline__ void copy_tile(const QueryTangentTile<T, kKeyDim, kValueDim>& tile, const P& p,
                                          const Tangents& tangents, unsigned batch, unsigned head, unsigned row,
                                          IsValid&& is_valid) {
  copy_rows<(kKeyDim > 128)>(tile.query(), tile.rows, row_pointer<T>(p.query, batch, head, row), p.query.row,
                             p.problem.key_dim, is_valid);
  if (tangents.query.data != nullptr) {
    copy_rows<(kKeyDim > 128)>(tile.tangent(), tile.rows, row_pointer<T>(tangents.query, batch, head, row),
                               tangents.query.row, p.problem.key_dim, is_valid);
  }
  if constexpr (kValueDim > 0) {
    copy_rows<(kKeyDim > 128)>(tile.grad_out(), tile.rows, row_pointer<T>(p.grad_out, batch, head, row), p.grad_out.row,
                               p.problem.value_dim, is_valid);
  }
}

// ``column``: the first column of the values.
template <typename T, int kKeyDim, int kColumns, typename P, typename IsValid>
__device__ __forceinline__ void copy_tile(const KeyTangentTile<T, kKeyDim, kColumns>& tile, const P& p,
                                          const Tangents& tangents, unsigned batch, unsigned key_head, unsigned row,
                                          int column, IsValid&& is_valid) {
  const int columns = p.problem.value_dim - column;
  copy_rows<(kKeyDim > 128)>(tile.key(), tile.rows, row_pointer<T>(p.key, batch, key_head, row), p.key.row,
                             p.problem.key_dim, is_valid);
  if (tangents.key.data != nullptr) {
    copy_rows<(kKeyDim > 128)>(tile.tangent_key(), tile.rows, row_pointer<T>(tangents.key, batch, key_head, row),
                               tangents.key.row, p.problem.key_dim, is_valid);
  }
  copy_rows<(kKeyDim > 128)>(tile.value(), tile.rows, row_pointer<T>(p.value, batch, key_head, row) + column,
                             p.value.row, columns, is_valid);
  if (tangents.value.data != nullptr) {
    copy_rows<(kKeyDim > 128)>(tile.tangent_value(), tile.rows,
                               row_pointer<T>(tangents.value, batch, key_head, row) + column, tangents.value.row,
                               columns, is_valid);
  }
}

// What a block copies tile by tile: keys, values and their tangents, see TileSource. Of tangents that are zero, the
// address is never used.
template <typename T, int kKeyDim, int kColumns, int kRows, int kWarps>
struct KeyTangentSource {
  TileSource<T, kKeyDim, kRows, kWarps> key, tangent_key;
  TileSource<T, kColumns, kRows, kWarps> value, tangent_value;

  template <typename P>
  __device__ __forceinline__ KeyTangentSource(const P& p, const Tangents& tangents, unsigned batch, unsigned key_head,
                                              int column)
      : key(row_pointer<T>(p.key, batch, key_head, 0), p.key.row, p.problem.key_dim),
        tangent_key(row_pointer<T>(tangents.key, batch, key_head, 0), tangents.key.row, p.problem.key_dim),
        value(row_pointer<T>(p.value, batch, key_head, 0) + column, p.value.row, p.problem.value_dim - column),
        tangent_value(row_pointer<T>(tangents.value, batch, key_head, 0) + column, tangents.value.row,
                      p.problem.value_dim - column) {}

  template <typename P, typename IsValid>
  __device__ __forceinline__ void copy(const KeyTangentTile<T, kKeyDim, kColumns>& tile, const P& p,
                                       const Tangents& tangents, unsigned row, bool all, IsValid&& is_valid) const {
    key.copy(tile.key(), row * p.key.row, all, is_valid);
    if (tangents.key.data != nullptr) {
      tangent_key.copy(tile.tangent_key(), row * tangents.key.row, all, is_valid);
    }
    value.copy(tile.value(), row * p.value.row, all, is_valid);
    if (tangents.value.data != nullptr) {
      tangent_value.copy(tile.tangent_value(), row * tangents.value.row, all, is_valid);
    }
  }
};

// The same for queries of the heads of a group, with their tangents and dO.
template <typename T, int kKeyDim, int kValueDim, int kRows, int kWarps>
struct QueryTangentSource {
  TileSource<T, kKeyDim, kRows, kWarps> query, tangent;
  TileSource<T, kValueDim, kRows, kWarps> grad_out;

  template <typename P>
  __device__ __forceinline__ QueryTangentSource(const P& p, const Tangents& tangents, unsigned batch, unsigned head)
      : query(row_pointer<T>(p.query, batch, head, 0), p.query.row, p.problem.key_dim),
        tangent(row_pointer<T>(tangents.query, batch, head, 0), tangents.query.row, p.problem.key_dim),
        grad_out(row_pointer<T>(p.grad_out, batch, head, 0), p.grad_out.row, p.problem.value_dim) {}

  template <typename P, typename Tiles, typename IsValid>
  __device__ __forceinline__ void copy(const QueryTangentTile<T, kKeyDim, kValueDim>& target, const P& p,
                                       const Tangents& tangents, const Tiles& tiles, const typename Tiles::Index& tile,
                                       bool all, IsValid&& is_valid) const {
    query.copy(target.query(), tiles.offset(p.query, tile), all, is_valid);
    if (tangents.query.data != nullptr) {
      tangent.copy(target.tangent(), tiles.offset(tangents.query, tile), all, is_valid);
    }
    grad_out.copy(target.grad_out(), tiles.offset(p.grad_out, tile), all, is_valid);
  }
};

// W += Gq K^T + Q Gk^T, for queries from ``row`` on.
template <bool kRare = false, int kTiles, typename Queries, typename Keys>
__device__ __forceinline__ void multiply_direction(float (&direction)[1][kTiles][4], const Queries& queries, int row,
                                                   const Keys& keys, const Tangents& tangents, bool exact) {
  if (tangents.query.data != nullptr) multiply_rows<kRare>(direction, queries.tangent(), row, keys.key(), exact);
  if (tangents.key.data != nullptr) multiply_rows<kRare>(direction, queries.query(), row, keys.tangent_key(), exact);
}

// W^T += K Gq^T + Gk Q^T, for keys from ``row`` on.
template <bool kRare = false, int kTiles, typename Queries, typename Keys>
__device__ __forceinline__ void multiply_direction_transposed(float (&direction)[1][kTiles][4], const Queries& queries,
                                                              const Keys& keys, int row, const Tangents& tangents,
                                                              bool exact) {
  if (tangents.query.data != nullptr) multiply_rows<kRare>(direction, keys.key(), row, queries.tangent(), exact);
  if (tangents.key.data != nullptr) multiply_rows<kRare>(direction, keys.tangent_key(), row, queries.query(), exact);
}

// W = scale * W + Gb in place; 0 where the score is masked. ``masked``: as in mask_scores, and true if there is a Gb.
template <bool kTransposed, int kTiles, typename T>
__device__ __forceinline__ void mask_direction(float (&direction)[1][kTiles][4], float scale, bool masked,
                                               const Visible<1, kTiles>& visible, const HeadMask<T>& tangent, int row,
                                               int column) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) direction[0][tile][i] *= scale;
  }
  if (tangent.kind != MaskKind::kNone) {
    tangent.with_float_entries([&]<typename Entry>() {
      for_entries<Entry, kTransposed, 1, kTiles>(tangent, row, column, [&](int, int tile, int i, const Entry* entry) {
        Entry added = {};
        if (visible.at(0, tile, i)) added = *entry;
        direction[0][tile][i] += device::to_float(added);
      });
    });
  }
  if (!masked) return;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) direction[0][tile][i] = visible.at(0, tile, i) ? direction[0][tile][i] : 0.0f;
  }
}

}  // namespace fastgen::attention
