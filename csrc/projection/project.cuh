// out = epilogue(x weight^T + bias): the forward passes, and the gradients of x.
//
//   main loop   y = x weight^T over the channels of x, product.cuh                         load, accumulate
//   stage       y + bias to shared memory in float32, in the memory order of the output
//   epilogue    merge:  out = residual + gate * y, 16 bytes per thread
//               heads:  out = RoPE(RMS norm(y)), one warp per head (heads.cuh)
//
//                output channels, BLOCK_N per block (whole heads for QK-norm and RoPE: bands)
//               +---------+---------+
//   BLOCK_M     |         |         |   one block per tile; neighboring blocks share their tokens
//   tokens      +---------+---------+
#pragma once

#include "device/vector.cuh"
#include "projection/heads.cuh"
#include "projection/product.cuh"

namespace fastgen::projection {

// The accumulated tile in shared memory; one of the strides is 1.
struct Staging {
  float* data;
  int row, column;

  __device__ __forceinline__ Staging(const TileShape& shape, bool tokens_across)
      : data(reinterpret_cast<float*>(device::dynamic_shared())),
        row(tokens_across ? 1 : shape.block_n + kPaddedColumns),
        column(tokens_across ? shape.block_m + kPaddedRows : 1) {}
  __device__ __forceinline__ float& at(int i, int j) const { return data[i * row + j * column]; }
};

// The position of a tile.
struct Corner {
  int batch, token, tokens, column, columns;

  __device__ __forceinline__ Corner(const ProjectParams& p, const TileShape& shape) {
    int tiles = 0, band = 0, first = 0;
    for (int i = 0; i < p.band_count; ++i) {
      tiles += static_cast<int>(ceil_div(p.bands[i].columns, p.bands[i].per_tile));
    }
    const int down = static_cast<int>(blockIdx.x) / tiles;
    int across = static_cast<int>(blockIdx.x) % tiles;  // neighboring blocks share their tokens
    for (; band < p.band_count; ++band) {
      const int of_band = static_cast<int>(ceil_div(p.bands[band].columns, p.bands[band].per_tile));
      if (across < of_band) break;
      across -= of_band;
    }
    first = across * p.bands[band].per_tile;
    column = p.bands[band].first + first;
    columns = smaller(p.bands[band].per_tile, p.bands[band].columns - first);
    const int tiles_down = static_cast<int>(ceil_div(p.tokens.count, shape.block_m));
    batch = down / tiles_down, token = down % tiles_down * shape.block_m;
    tokens = smaller(shape.block_m, p.tokens.count - token);
  }
};

// Consecutive floats from a 16-byte aligned address.
template <int kCount>
__device__ __forceinline__ void load_floats(const float* source, float (&values)[kCount]) {
#pragma unroll
  for (int first = 0; first < kCount; first += 4) {
    float four[4];
    device::load_vector(source + first, four);
#pragma unroll
    for (int e = 0; e < 4; ++e) values[first + e] = four[e];
  }
}

// residual + gate * y, 16 bytes at a time.
template <typename T, int kThreads>
__device__ __forceinline__ void store_plain(const ProjectParams& p, const Corner& at, const Staging& staging,
                                            bool tokens_across) {
  constexpr int kChunk = device::kVectorElements<T>;
  const int lines = tokens_across ? at.columns : at.tokens;
  const int chunks = static_cast<int>(ceil_div(tokens_across ? at.tokens : at.columns, kChunk));
  for (int index = static_cast<int>(threadIdx.x); index < lines * chunks; index += kThreads) {
    const int line = index / chunks, first = index % chunks * kChunk;
    const int i = tokens_across ? first : line, j = tokens_across ? line : first;
    const int token = at.token + i, channel = at.column + j;
    float y[kChunk];
    load_floats(&staging.at(i, j), y);
    T residual[kChunk] = {}, out[kChunk];
    if (p.residual.count > 0) {
      device::load_vector(address<const T>(p.residual, at.batch, token, channel), residual);
    }
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      float value = y[e];
      if (p.gate.data != nullptr) {
        value *= device::to_float(*element<T>(p.gate, at.batch, tokens_across ? channel : channel + e));
      }
      out[e] = device::from_float<T>(device::to_float(residual[e]) + value);
    }
    device::store_vector(address<T>(p.out, at.batch, token, channel), out);
  }
}

// QK-norm and RoPE. A band belongs to one part, so that a tile consists of whole heads of one size.
template <typename T, int kThreads>
__device__ __forceinline__ void store_heads(const ProjectParams& p, const Corner& at, const Staging& staging,
                                            int part) {
  const int dim = p.out.parts[part].dim, heads = at.columns / dim;
  const void* norm = part < p.epilogue.norm_count ? p.epilogue.norms[part] : nullptr;
  for (int index = static_cast<int>(threadIdx.x / 32); index < at.tokens * heads; index += kThreads / 32) {
    const int i = index / heads, j = index % heads * dim, token = at.token + i, channel = at.column + j;
    T* kept =
        norm != nullptr && p.epilogue.kept.count > 0 ? address<T>(p.epilogue.kept, at.batch, token, channel) : nullptr;
    store_head(&staging.at(i, j), dim, norm, part < p.epilogue.rotated, p.epilogue, Place(p.tokens, at.batch, token),
               address<T>(p.out, at.batch, token, channel), kept);
  }
}

// kTokensAcross: tokens of x are contiguous (channels-first). kInputsRows: weight is (x.channels, out.channels).
template <typename T, int kTileIndex, bool kTokensAcross, bool kInputsRows>
__global__ void __launch_bounds__(kTileShapes[kTileIndex].threads(), resident_blocks(kTileIndex, sizeof(T)))
    projection_project(const __grid_constant__ ProjectParams p) {
  using Product = TileProduct<T, kTileIndex, kTokensAcross, kInputsRows>;
  constexpr TileShape kShape = Product::kShape;
  constexpr int kThreads = Product::kThreads, BLOCK_K = Product::BLOCK_K;
  const Corner at(p, kShape);
  const int inputs = p.x.channels;
  const T* weight = static_cast<const T*>(p.weight);

  Product product;
  product.run(
      0, ceil_div(inputs, BLOCK_K), p.exact,
      [&](int64_t tile, int stage) {
        const int first = static_cast<int>(tile) * BLOCK_K;
        Product::left(stage).template copy<kThreads>(p.weight, [&](int i, int k) -> const void* {
          const bool valid = i < at.tokens && first + k < inputs;
          return valid ? address<const T>(p.x, at.batch, at.token + i, first + k) : nullptr;
        });
        Product::right(stage).template copy<kThreads>(p.weight, [&](int j, int k) -> const void* {
          if (j >= at.columns || first + k >= inputs) return nullptr;
          const int row = kInputsRows ? first + k : at.column + j, column = kInputsRows ? at.column + j : first + k;
          return weight + row * p.weight_row + column;
        });
      },
      [](const Factor<T>&, int) {});

  const bool tokens_across = p.out.channel != 1;
  const Staging staging(kShape, tokens_across);
  device::sync_block();  // the staging overwrites the stages of the main loop
#pragma unroll
  for (int tile = 0; tile < Product::kTiles; ++tile) {
    const int j = product.column + tile * 8 + lane_column();
    float bias[2] = {};
    if (p.bias != nullptr) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (j + e < at.columns) bias[e] = device::to_float(static_cast<const T*>(p.bias)[at.column + j + e]);
      }
    }
#pragma unroll
    for (int m = 0; m < Product::kFragments; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = product.row + m * kFragmentRows + lane_row() + half * 8;
        const float (&sums)[4] = product.sums[m][tile];
        const float y[2] = {sums[2 * half] + bias[0], sums[2 * half + 1] + bias[1]};
        if (tokens_across) {
          staging.at(i, j) = y[0], staging.at(i, j + 1) = y[1];
        } else {
          const uint32_t words[2] = {float_to_bits(y[0]), float_to_bits(y[1])};
          device::store_words(&staging.at(i, j), words);
        }
      }
    }
  }
  device::sync_block();

  int part = 0;
  while (part + 1 < p.out.count && at.column >= p.out.parts[part + 1].first) ++part;
  if (part < p.epilogue.norm_count || part < p.epilogue.rotated) {
    store_heads<T, kThreads>(p, at, staging, part);
  } else {
    store_plain<T, kThreads>(p, at, staging, tokens_across);
  }
}

}  // namespace fastgen::projection
