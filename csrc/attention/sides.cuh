// Two sides of a tile of scores that is differentiated in a direction: queries and keys, with their tangents.
//
// The direction of the scores is W = scale (Gq K^T + Q Gk^T) + Gb, for tangents Gq, Gk and Gb.
#pragma once

#include "attention/position.cuh"

namespace fastgen::attention {

// In shared memory: queries, their tangents and, with kValueDim > 0, the gradient of the output.
template <typename T, int kKeyDim, int kValueDim>
struct QuerySide {
  static constexpr int kKeyRow = row_bytes(kKeyDim, sizeof(T));
  static constexpr int kBytes = query_side_bytes({kKeyDim, kValueDim}, sizeof(T), kValueDim > 0);  // of a row
  unsigned char* data;
  int rows;

  __device__ __forceinline__ Tile<T, kKeyDim> query() const { return {reinterpret_cast<T*>(data)}; }
  __device__ __forceinline__ Tile<T, kKeyDim> tangent() const { return {reinterpret_cast<T*>(data + rows * kKeyRow)}; }
  __device__ __forceinline__ Tile<T, kValueDim> grad_out() const {
    return {reinterpret_cast<T*>(data + 2 * rows * kKeyRow)};
  }
};

// Keys, values and their tangents; of the values kColumns columns.
template <typename T, int kKeyDim, int kColumns>
struct KeySide {
  static constexpr int kKeyRow = row_bytes(kKeyDim, sizeof(T)), kValueRow = row_bytes(kColumns, sizeof(T));
  static constexpr int kBytes = key_side_bytes({kKeyDim, kColumns}, sizeof(T));  // of a row
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

// Starts copying the rows from ``row`` on. P: TangentParams or BackwardParams.
template <typename T, int kKeyDim, int kValueDim, typename P, typename There>
__device__ __forceinline__ void copy_side(const QuerySide<T, kKeyDim, kValueDim>& side, const P& p,
                                          const Tangents& tangents, unsigned batch, unsigned head, unsigned row,
                                          There&& there) {
  copy_rows(side.query(), side.rows, rows_of<T>(p.query, batch, head, row), p.query.row, p.problem.key_dim, there);
  if (tangents.query.data != nullptr) {
    copy_rows(side.tangent(), side.rows, rows_of<T>(tangents.query, batch, head, row), tangents.query.row,
              p.problem.key_dim, there);
  }
  if constexpr (kValueDim > 0) {
    copy_rows(side.grad_out(), side.rows, rows_of<T>(p.grad_out, batch, head, row), p.grad_out.row, p.problem.value_dim,
              there);
  }
}

// ``column``: of the values, where this block's begin.
template <typename T, int kKeyDim, int kColumns, typename P, typename There>
__device__ __forceinline__ void copy_side(const KeySide<T, kKeyDim, kColumns>& side, const P& p,
                                          const Tangents& tangents, unsigned batch, unsigned key_head, unsigned row,
                                          int column, There&& there) {
  const int columns = p.problem.value_dim - column;
  copy_rows(side.key(), side.rows, rows_of<T>(p.key, batch, key_head, row), p.key.row, p.problem.key_dim, there);
  if (tangents.key.data != nullptr) {
    copy_rows(side.tangent_key(), side.rows, rows_of<T>(tangents.key, batch, key_head, row), tangents.key.row,
              p.problem.key_dim, there);
  }
  copy_rows(side.value(), side.rows, rows_of<T>(p.value, batch, key_head, row) + column, p.value.row, columns, there);
  if (tangents.value.data != nullptr) {
    copy_rows(side.tangent_value(), side.rows, rows_of<T>(tangents.value, batch, key_head, row) + column,
              tangents.value.row, columns, there);
  }
}

// direction += Gq K^T + Q Gk^T: rows of the queries from ``row`` on.
template <int kTiles, typename Queries, typename Keys>
__device__ __forceinline__ void multiply_direction(float (&direction)[1][kTiles][4], const Queries& queries, int row,
                                                   const Keys& keys, const Tangents& tangents, bool exact) {
  if (tangents.query.data != nullptr) multiply_rows(direction, queries.tangent(), row, keys.key(), exact);
  if (tangents.key.data != nullptr) multiply_rows(direction, queries.query(), row, keys.tangent_key(), exact);
}

// The same transposed: rows of the keys.
template <int kTiles, typename Queries, typename Keys>
__device__ __forceinline__ void multiply_direction_transposed(float (&direction)[1][kTiles][4], const Queries& queries,
                                                              const Keys& keys, int row, const Tangents& tangents,
                                                              bool exact) {
  if (tangents.query.data != nullptr) multiply_rows(direction, keys.key(), row, queries.tangent(), exact);
  if (tangents.key.data != nullptr) multiply_rows(direction, keys.tangent_key(), row, queries.query(), exact);
}

// Products become the direction: times ``scale``, plus the mask's tangent, if any; 0 where the score is not visible.
template <bool kTransposed, int kTiles, typename T>
__device__ __forceinline__ void finish_direction(float (&direction)[1][kTiles][4], float scale,
                                                 const Visible<1, kTiles>& visible, const HeadMask<T>& tangent, int row,
                                                 int column) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool seen = visible.at(0, tile, i);
      float value = seen ? direction[0][tile][i] * scale : 0.0f;
      if (seen && tangent.kind != MaskKind::kNone) {
        const int down = row + i / 2 * 8 + lane_row(), across = column + tile * 8 + lane_column() + i % 2;
        value += kTransposed ? tangent.value(across, down) : tangent.value(down, across);
      }
      direction[0][tile][i] = value;
    }
  }
}

}  // namespace fastgen::attention
