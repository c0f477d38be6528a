// Second-order backward of wide heads: second_order.cuh in blocks of eight warps that divide the depth of the products
// of scores and the columns of the results (wide_depth.cuh).
#pragma once

#include "attention/second_order.cuh"
#include "attention/wide_tangent.cuh"

namespace fastgen::attention {

// Shared memory: partial sums of S, W, dP and C, later dS2, dS and Pt, then the stages of the iterated operands with
// their tangents.
template <typename T, int kKeyDim, int kValueDim>
struct WideSecondOrderLayout {
  static constexpr int kThreads = 32 * kWideWarps, kIterated = kWideIterated<T>, kTiles = kIterated / 8;
  static constexpr int kKeyColumns = kKeyDim / kWideWarps, kValueColumns = kValueDim / kWideWarps;
  using Exchange = WideExchange<T, 4>;
  using Queries = QueryTangentTile<T, kKeyDim, kValueDim>;
  using Keys = KeyTangentTile<T, kKeyDim, kValueDim>;
  using KeyColumns = OwnedRows<T, kKeyColumns>;
  using ValueColumns = OwnedRows<T, kValueColumns>;

  template <typename Iterated>
  static __device__ __forceinline__ Iterated iterated(int i) {
    return {device::dynamic_shared() + Exchange::kBytes + i * kIterated * Iterated::kBytes, kIterated};
  }
};

// What one score adds to the results: dS and dS2, and Pt before dropout.
struct WideGradients {
  float first, second, tangent;

  // ``grad``, ``cross``: dP and C before dropout, by whose ``factor`` they are multiplied.
  __device__ __forceinline__ WideGradients(const WideScore& score, float grad, float cross, float factor,
                                           const SecondOrderRow& row) {
    tangent = score.weight, first = grad * factor - row.delta, second = score.direction - row.mean;
    cross = cross * factor - row.second_delta;
    if (score.clears && score.weight == 0.0f) first = second = cross = 0.0f;
    multiply(tangent, second, first, cross);
  }
  // To the gradients of the products q.k, where scores are capped.
  __device__ __forceinline__ void uncap(const WideScore& score, const Problem& p) {
    if (is_capped(p)) cap_gradient(first, second, score.product, score.tangent, p);
  }
};

// dP and C of a warp's columns, where the values are the tile.
template <typename T, int kColumns, int kTiles, int kWidth>
__device__ __forceinline__ void multiply_gradients_and_cross(float (&grads)[kTiles][4], float (&cross)[kTiles][4],
                                                             const OwnedRows<T, kColumns>& left,
                                                             const Tile<T, kWidth>& value,
                                                             const Tile<T, kWidth>& tangent_value, bool has_tangent,
                                                             int column, bool exact) {
#pragma unroll
  for (int strip = 0; strip < kColumns / Strip<T>::kColumns; ++strip) {
    const int at = column + strip * Strip<T>::kColumns;
    Strip<T>(value, at, exact).multiply(grads, left, strip, exact);
    if (has_tangent) Strip<T>(tangent_value, at, exact).multiply(cross, left, strip, exact);
  }
}
// The same where the values are the owned rows.
template <typename T, int kColumns, int kTiles, int kWidth>
__device__ __forceinline__ void multiply_gradients_and_cross(float (&grads)[kTiles][4], float (&cross)[kTiles][4],
                                                             const OwnedRows<T, kColumns>& value,
                                                             const OwnedRows<T, kColumns>& tangent_value,
                                                             bool has_tangent, const Tile<T, kWidth>& right, int column,
                                                             bool exact) {
#pragma unroll
  for (int strip = 0; strip < kColumns / Strip<T>::kColumns; ++strip) {
    const Strip<T> of_right(right, column + strip * Strip<T>::kColumns, exact);
    of_right.multiply(grads, value, strip, exact);
    if (has_tangent) of_right.multiply(cross, tangent_value, strip, exact);
  }
}

// A warp's columns of the owned queries.
template <typename T, int kKeyDim, int kValueDim>
struct WideQueries {
  using Layout = WideSecondOrderLayout<T, kKeyDim, kValueDim>;
  typename Layout::KeyColumns query, tangent;
  typename Layout::ValueColumns grad_out;
  int key_column = static_cast<int>(threadIdx.x / 32) * Layout::kKeyColumns;
  int value_column = static_cast<int>(threadIdx.x / 32) * Layout::kValueColumns;

  __device__ __forceinline__ WideQueries(const SecondOrderParams& p, unsigned batch, unsigned head, int row, int rows) {
    const auto load = [&](auto& owned, const Operand& operand, int column, int columns) {
      if (operand.data == nullptr) return;
      owned.load(row_pointer<T>(operand, batch, head, row) + column, operand.row, rows, columns - column);
    };
    load(query, p.first.query, key_column, p.first.problem.key_dim);
    load(tangent, p.tangents.query, key_column, p.first.problem.key_dim);
    load(grad_out, p.first.grad_out, value_column, p.first.problem.value_dim);
  }

  // The partial sums of S, W, dP and C of a tile, to shared memory.
  __device__ __forceinline__ void store_scores(const SecondOrderParams& p, const typename Layout::Keys& keys) const {
    using Exchange = typename Layout::Exchange;
    constexpr int kTiles = Layout::kTiles;
    const Problem& problem = p.first.problem;
    float scores[kTiles][4] = {}, direction[kTiles][4] = {}, grads[kTiles][4] = {}, cross[kTiles][4] = {};
    if (key_column < problem.key_dim) {
      multiply_scores_and_direction(scores, direction, query, tangent, p.tangents.query.data != nullptr, keys.key(),
                                    keys.tangent_key(), p.tangents.key.data != nullptr, key_column, problem.exact);
    }
    if (value_column < problem.value_dim) {
      multiply_gradients_and_cross(grads, cross, grad_out, keys.value(), keys.tangent_value(),
                                   p.tangents.value.data != nullptr, value_column, problem.exact);
    }
    Exchange::store(0, scores), Exchange::store(1, direction), Exchange::store(2, grads), Exchange::store(3, cross);
  }
};

// rowsum(a * b) over the columns of a row, in eight consecutive threads.
template <typename T>
__device__ __forceinline__ float wide_row_product(const T* a, const T* b, int columns) {
  constexpr int kChunk = device::kVectorElements<T>;
  float sum = 0.0f;
#pragma unroll 1
  for (int column = static_cast<int>(threadIdx.x % 8) * kChunk; column < columns; column += 8 * kChunk) {
    T x[kChunk], y[kChunk];
    device::load_vector(a + column, x), device::load_vector(b + column, y);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum += device::to_float(x[i]) * device::to_float(y[i]);
  }
  return team_sum(sum, 8);
}

// gridDim = (query tiles of all heads).
template <typename T, int kKeyDim, int kValueDim>
__global__ void __launch_bounds__(WideSecondOrderLayout<T, kKeyDim, kValueDim>::kThreads, 1)
    attention_second_order_query_wide(SecondOrderParams p) {
  using Layout = WideSecondOrderLayout<T, kKeyDim, kValueDim>;
  using Exchange = typename Layout::Exchange;
  using Keys = typename Layout::Keys;
  constexpr int BLOCK_M = kWideOwned, BLOCK_N = Layout::kIterated;
  using Tiles = KeyTiles<T, BLOCK_N, false>;
  const Problem& problem = p.first.problem;
  const QueryBlock block(problem, blockIdx.x, BLOCK_M, MayPack<true>{});
  if (block.rows() <= 0) return;
  const Tiles tiles(problem, block);
  const HeadMask<T> mask_tangent(p.tangents.mask, block.batch, block.head);
  const int row = block.queries.begin;

  const auto load_keys = [&](const typename Tiles::Index& tile, int i) {
    copy_tile(Layout::template iterated<Keys>(i), p.first, p.tangents, block.key_batch, block.key_head, tile.key(), 0,
              [&](int row) { return tile.is_live(row); });
  };
  const typename Tiles::Index first = tiles.first();
  load_keys(first, 0);
  device::async_copy_commit();
  const WideQueries<T, kKeyDim, kValueDim> queries(p, block.batch, block.head, row, block.rows());
  const int key_column = queries.key_column;

  const ScorePlace<T> place;
  SecondOrderRow of_row;
  if (place.exists()) {
    const int at = row + smaller(place.row, block.rows() - 1);  // all lanes add
    const T* grad = row_pointer<T>(p.first.grad_out, block.batch, block.head, at);
    of_row.delta = wide_row_product(row_pointer<T>(p.first.out, block.batch, block.head, at), grad, problem.value_dim);
    of_row.second_delta =
        wide_row_product(row_pointer<T>(p.tangent_out, block.batch, block.head, at), grad, problem.value_dim);
    of_row.mean = *row_pointer(p.tangent_lse, block.batch, block.head, at);
    if (p.first.grad_lse.data != nullptr) {
      of_row.delta -= *row_pointer(p.first.grad_lse, block.batch, block.head, at);
    }
    if (place.row < block.rows()) {
      of_row.shift = weight_shift(kLog2e * *row_pointer(p.first.lse, block.batch, block.head, at));
      if (place.column == 0) {
        p.first.delta[block.first_row + at] = of_row.delta;
        p.second_delta[block.first_row + at] = of_row.second_delta;
      }
    }
  }

  const Band window = Band::of<false>(problem, row);
  float sums[1][Layout::kKeyColumns / 8][4] = {};
  pipeline(p.first.stages, tiles, first, load_keys, [&](const typename Tiles::Index& tile, int stage) {
    // scores
    const Keys keys = Layout::template iterated<Keys>(stage);
    queries.store_scores(p, keys);
    device::sync_block();
    // softmax: dS2 and dS
    if (place.exists()) {
      const Band band = window.from(tile.key());
      const int query = row + place.row, key = tile.key() + place.column;
      const bool inside =
          place.row < block.rows() && tile.is_live(place.column) && band.contains(place.row, place.column);
      const WideScore score(Exchange::sum(0), Exchange::sum(1), problem, inside, tiles.mask, mask_tangent, query, key,
                            of_row.shift);
      const float factor =
          problem.dropout.seeds == nullptr ? 1.0f : HeadDropout(problem, block.first_row).factor_of(query, key);
      WideGradients found(score, Exchange::sum(2), Exchange::sum(3), factor, of_row);
      found.uncap(score, problem);
      device::sync_warp();  // the partial sums have been read
      Exchange::store_weight(0, found.second), Exchange::store_weight(1, found.first);
      Exchange::store_attended(score.visible);
    }
    device::sync_block();
    // accumulate
    if (key_column < problem.key_dim) {
      const Attended<T> attended(Exchange::words());
      attended.multiply(sums, Exchange::weights(0, problem.exact), keys.key(), key_column, problem.exact);
      if (p.tangents.key.data != nullptr) {
        attended.multiply(sums, Exchange::weights(1, problem.exact), keys.tangent_key(), key_column, problem.exact);
      }
    }
  });

  // epilogue
  const float factors[1][2] = {{problem.scale, problem.scale}};
  store_rows(row_pointer<T>(p.first.grad_query, block.batch, block.head, row) + key_column, p.first.grad_query.row,
             block.rows(), problem.key_dim - key_column, factors, sums);
}

// Scores are transposed: rows are keys, columns are queries. gridDim = (key tiles of all key heads).
template <typename T, int kKeyDim, int kValueDim>
__global__ void __launch_bounds__(WideSecondOrderLayout<T, kKeyDim, kValueDim>::kThreads, 1)
    attention_second_order_key_value_wide(SecondOrderParams p) {
  using Layout = WideSecondOrderLayout<T, kKeyDim, kValueDim>;
  using Exchange = typename Layout::Exchange;
  using Queries = typename Layout::Queries;
  constexpr int BLOCK_N = kWideOwned, BLOCK_M = Layout::kIterated, kTiles = Layout::kTiles;
  using Tiles = QueryTiles<BLOCK_M>;
  const Problem& problem = p.first.problem;
  const bool has_query = p.tangents.query.data != nullptr, has_key = p.tangents.key.data != nullptr;
  const bool has_value = p.tangents.value.data != nullptr;
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int key_column = warp * Layout::kKeyColumns, value_column = warp * Layout::kValueColumns;
  const KeyBlock<true> block(problem, blockIdx.x, BLOCK_N);
  if (block.keys.empty()) return;
  const Tiles tiles = Tiles::template make<T, BLOCK_N, false>(problem, block);
  const int first_key = block.keys.begin, rows = block.keys.end - first_key;

  const auto load_queries = [&](const typename Tiles::Index& tile, int i) {
    const int head = tiles.head(tile), query = tiles.query(tile), existing = block.all_queries(problem) - query;
    const auto is_valid = [&](int row) { return row < existing; };
    const Queries queries = Layout::template iterated<Queries>(i);
    copy_tile(queries, p.first, p.tangents, block.query_batch(problem), head, query, is_valid);
    const int64_t first = block.first_row(problem, head) + query;
    const float* lse = row_pointer(p.first.lse, block.query_batch(problem), head, query);
    const float* mean = row_pointer(p.tangent_lse, block.query_batch(problem), head, query);
    for (int row = threadIdx.x; row < BLOCK_M; row += blockDim.x) {
      float* extra = queries.query().row_extra(row);
      const int bytes = is_valid(row) ? 4 : 0;
      device::async_copy<4>(extra, lse + row * p.first.lse.row, bytes);
      device::async_copy<4>(extra + 1, p.first.delta + first + row, bytes);
      device::async_copy<4>(extra + 2, mean + row * p.tangent_lse.row, bytes);
      device::async_copy<4>(extra + 3, p.second_delta + first + row, bytes);
    }
  };
  if (tiles.has_first()) load_queries(tiles.first(), 0);
  device::async_copy_commit();
  typename Layout::KeyColumns key, tangent_key;
  typename Layout::ValueColumns value, tangent_value;
  const auto load = [&](auto& owned, const Operand& operand, int column, int columns) {
    if (operand.data == nullptr) return;
    owned.load(row_pointer<T>(operand, block.batch(problem), block.key_head, first_key) + column, operand.row, rows,
               columns - column);
  };
  load(key, p.first.key, key_column, problem.key_dim);
  load(tangent_key, p.tangents.key, key_column, problem.key_dim);
  load(value, p.first.value, value_column, problem.value_dim);
  load(tangent_value, p.tangents.value, value_column, problem.value_dim);

  const ScorePlace<T> place;
  const Band window = Band::of<true>(problem, first_key);
  float key_sums[1][Layout::kKeyColumns / 8][4] = {}, value_sums[1][Layout::kValueColumns / 8][4] = {};
  pipeline(p.first.stages, tiles, tiles.first(), load_queries, [&](const typename Tiles::Index& tile, int stage) {
    // scores
    const Queries queries = Layout::template iterated<Queries>(stage);
    float scores[kTiles][4] = {}, direction[kTiles][4] = {}, grads[kTiles][4] = {}, cross[kTiles][4] = {};
    if (key_column < problem.key_dim) {
      multiply_scores_and_direction(scores, direction, key, tangent_key, has_key, queries.query(), queries.tangent(),
                                    has_query, key_column, problem.exact);
    }
    if (value_column < problem.value_dim) {
      multiply_gradients_and_cross(grads, cross, value, tangent_value, has_value, queries.grad_out(), value_column,
                                   problem.exact);
    }
    Exchange::store(0, scores), Exchange::store(1, direction), Exchange::store(2, grads), Exchange::store(3, cross);
    device::sync_block();
    // softmax: dS2^T, dS^T and Pt^T
    if (place.exists()) {
      const int head = tiles.head(tile), first_query = tiles.query(tile);
      const HeadMask<T> mask(problem.mask, block.batch(problem), head);
      const HeadMask<T> mask_tangent(p.tangents.mask, block.batch(problem), head);
      const Band band = window.from(first_query);
      const int query = first_query + place.column, at = first_key + place.row;
      const bool inside =
          place.row < rows && query < tiles.queries(problem, block, tile).end && band.contains(place.row, place.column);
      float extra[4];
      device::load_vector(queries.query().row_extra(place.column), extra);
      const SecondOrderRow of_row = {weight_shift(kLog2e * extra[0]), extra[1], extra[2], extra[3]};
      const WideScore score(Exchange::sum(0), Exchange::sum(1), problem, inside, mask, mask_tangent, query, at,
                            of_row.shift);
      const float factor = problem.dropout.seeds == nullptr
                               ? 1.0f
                               : HeadDropout(problem, block.first_row(problem, head)).factor_of(query, at);
      WideGradients found(score, Exchange::sum(2), Exchange::sum(3), factor, of_row);
      found.uncap(score, problem);
      device::sync_warp();  // the partial sums have been read
      Exchange::store_weight(0, found.second), Exchange::store_weight(1, found.first);
      Exchange::store_weight(2, found.tangent * factor);
      Exchange::store_attended(score.visible);
    }
    device::sync_block();
    // accumulate
    const Attended<T> attended(Exchange::words());
    if (value_column < problem.value_dim) {
      attended.multiply(value_sums, Exchange::weights(2, problem.exact), queries.grad_out(), value_column,
                        problem.exact);
    }
    if (key_column < problem.key_dim) {
      attended.multiply(key_sums, Exchange::weights(0, problem.exact), queries.query(), key_column, problem.exact);
      if (has_query) {
        attended.multiply(key_sums, Exchange::weights(1, problem.exact), queries.tangent(), key_column, problem.exact);
      }
    }
  });

  // epilogue
  const float factors[1][2] = {{problem.scale, problem.scale}}, ones[1][2] = {{1.0f, 1.0f}};
  store_rows(row_pointer<T>(p.first.grad_value, block.batch(problem), block.key_head, first_key) + value_column,
             p.first.grad_value.row, rows, problem.value_dim - value_column, ones, value_sums);
  store_rows(row_pointer<T>(p.first.grad_key, block.batch(problem), block.key_head, first_key) + key_column,
             p.first.grad_key.row, rows, problem.key_dim - key_column, factors, key_sums);
}

}  // namespace fastgen::attention
