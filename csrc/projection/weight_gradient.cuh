// Gradients of a weight and its bias: split-K over tokens, then a reduction.
//
//   projection_weight_gradient   for each tile of BLOCK_K tokens of the split        product.cuh
//                                  parts[split] += grad^T x                          load, accumulate
//                                  bias_parts[split] += row sums of grad^T           a product with ones
//   projection_reduce            grad_weight = gate * sum of parts, grad_gate        epilogue, in a fixed order
//
//                       channels of x, BLOCK_N per block
//                      +---------+---------+
//   BLOCK_M channels   |         |         |   gridDim = (column tiles, row tiles, splits)
//   of grad            +---------+---------+
#pragma once

#include "common/reduce.cuh"
#include "projection/matrix.cuh"
#include "projection/product.cuh"

namespace fastgen::projection {

// Row sums of the left operand, as its product with ones: every column is the same.
template <typename T, int kFragments>
struct RowSums {
  float sums[kFragments][4] = {};

  __device__ __forceinline__ void add(const Factor<T>& left, int fragment, bool exact) {
    uint32_t one = float_to_bits(1.0f);
    if constexpr (sizeof(T) == 2) one = device::pack<T>(1.0f, 1.0f);
    const uint32_t loaded[4] = {one, one, one, one};
    Factor<T> ones;
    ones.set(loaded, exact);
    Product<T>::multiply(sums[fragment], left, ones, 0, exact);
  }
};

// parts[split] = grad^T x over the split's tokens. kGradTokensAcross, kTokensAcross: tokens are contiguous.
template <typename T, int kTileIndex, bool kGradTokensAcross, bool kTokensAcross>
__global__ void __launch_bounds__(kTileShapes[kTileIndex].threads(), resident_blocks(kTileIndex, sizeof(T)))
    projection_weight_gradient(const __grid_constant__ WeightGradientParams p) {
  using Product = TileProduct<T, kTileIndex, !kGradTokensAcross, !kTokensAcross>;
  constexpr int kThreads = Product::kThreads, BLOCK_K = Product::BLOCK_K;
  const int row = static_cast<int>(blockIdx.y) * Product::BLOCK_M;
  const int column = static_cast<int>(blockIdx.x) * Product::BLOCK_N;
  const int rows = p.grad.channels - row, columns = p.x.channels - column;
  const int64_t tiles_each = ceil_div(p.tokens.count, BLOCK_K), all = tiles_each * p.tokens.batch;
  const int64_t first = blockIdx.z * p.tiles, left = all - first;

  Product product;
  RowSums<T, Product::kFragments> bias;
  const bool with_bias = p.bias_parts != nullptr && blockIdx.x == 0 && product.column == 0;
  product.run(
      first, left < p.tiles ? left : p.tiles, p.exact,
      [&](int64_t tile, int stage) {
        const int batch = static_cast<int>(tile / tiles_each);
        const int token = static_cast<int>(tile % tiles_each) * BLOCK_K, tokens = p.tokens.count - token;
        Product::left(stage).template copy<kThreads>(p.grad.parts[0].data, [&](int i, int k) -> const void* {
          return i < rows && k < tokens ? address<const T>(p.grad, batch, token + k, row + i) : nullptr;
        });
        Product::right(stage).template copy<kThreads>(p.grad.parts[0].data, [&](int j, int k) -> const void* {
          return j < columns && k < tokens ? address<const T>(p.x, batch, token + k, column + j) : nullptr;
        });
      },
      [&](const Factor<T>& operand, int fragment) {
        if (with_bias) bias.add(operand, fragment, p.exact);
      });

  float* parts = p.parts + static_cast<int64_t>(blockIdx.z) * p.grad.channels * p.x.channels;
#pragma unroll
  for (int m = 0; m < Product::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = product.row + m * kFragmentRows + lane_row() + half * 8;
      if (i >= rows) continue;
#pragma unroll
      for (int tile = 0; tile < Product::kTiles; ++tile) {
        const int j = product.column + tile * 8 + lane_column();
        const float (&sums)[4] = product.sums[m][tile];
        const uint32_t words[2] = {float_to_bits(sums[2 * half]), float_to_bits(sums[2 * half + 1])};
        // The number of channels is a multiple of four, so both columns exist.
        if (j < columns) {
          device::store_words(parts + static_cast<int64_t>(row + i) * p.x.channels + column + j, words);
        }
      }
      if (with_bias && threadIdx.x % 4 == 0) {
        p.bias_parts[static_cast<int64_t>(blockIdx.z) * p.grad.channels + row + i] = bias.sums[m][2 * half];
      }
    }
  }
}

// One block per row: the sum of the parts, in order, times the gate; and the gradient of the row's gate, the inner
// product of that sum with the weight.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) projection_reduce(const __grid_constant__ ReduceParams p) {
  const int row = static_cast<int>(blockIdx.x);
  const bool gated = p.gate.data != nullptr;
  const float gate = gated ? device::to_float(*element<T>(p.gate, 0, row)) : 1.0f;
  float inner = 0.0f;
  for (int column = static_cast<int>(threadIdx.x); column < p.columns; column += kSumThreads) {
    const int64_t at = static_cast<int64_t>(row) * p.columns + column;
    float sum = 0.0f;
    for (int split = 0; split < p.splits; ++split)
      sum += p.parts[split * static_cast<int64_t>(p.rows) * p.columns + at];
    static_cast<T*>(p.grad_weight)[at] = device::from_float<T>(sum * gate);
    if (gated) inner += sum * device::to_float(static_cast<const T*>(p.weight)[row * p.weight_row + column]);
  }
  if (p.bias_parts == nullptr && !gated) return;
  inner = block_sum<kSumThreads>(inner);
  if (threadIdx.x != 0) return;
  if (p.bias_parts != nullptr) {
    float sum = 0.0f;
    for (int split = 0; split < p.splits; ++split) sum += p.bias_parts[split * static_cast<int64_t>(p.rows) + row];
    static_cast<T*>(p.grad_bias)[row] = device::from_float<T>(sum * gate);
    if (gated) inner += sum * device::to_float(static_cast<const T*>(p.bias)[row]);
  }
  if (gated) p.grad_gate[row] = inner;
}

// out = gate * weight, row by row.
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    projection_scale_rows(const T* weight, int64_t weight_row, Vector gate, T* out, int columns) {
  const int row = static_cast<int>(blockIdx.x);
  const float factor = device::to_float(*element<T>(gate, 0, row));
  for (int column = static_cast<int>(threadIdx.x); column < columns; column += kSumThreads) {
    const float value = device::to_float(weight[row * weight_row + column]) * factor;
    out[static_cast<int64_t>(row) * columns + column] = device::from_float<T>(value);
  }
}

// Column sums of (rows, columns), one block per column.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) projection_sum_rows(const float* parts, int rows, int columns, T* out) {
  float sum = 0.0f;
  for (int row = static_cast<int>(threadIdx.x); row < rows; row += kSumThreads) {
    sum += parts[static_cast<int64_t>(row) * columns + blockIdx.x];
  }
  sum = block_sum<kSumThreads>(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = device::from_float<T>(sum);
}

}  // namespace fastgen::projection
