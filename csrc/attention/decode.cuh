// Forward pass of few queries against many keys, as in generation with a cache: split keys (Dao, Haziza, Massa, Sizov,
// "Flash-Decoding", 2023), and the heads that share a key head packed into the rows of one fragment.
//
//   load Q                                                  rows: decode_scheduler.cuh
//   for each key tile of the warp                           in its own ring of stages, without barriers
//     S = scale * Q K^T + mask, online softmax, O += P V    as in forward.cuh
//   m = max of the warps' maxima, O = sum of 2^(m_w - m) O_w, l = sum of 2^(m_w - m) l_w, in the order of the warps
//   one split:      out = O / l, lse = m + log l
//   several:        O, m, l to the workspace; attention_combine does the same once more, over splits
//
//                    keys -> tiles of warp 0, 1, ... of split 0, of split 1, ..., and over again
//                  +----+----+----+----+----
//   block: rows of | w0 | w1 | w0 | w1 | w0        16 rows: one fragment per warp
//   one key head   +----+----+----+----+----
//
// gridDim = (row tiles of all key heads, splits).
#pragma once

#include "attention/combine.cuh"
#include "attention/decode_mask.cuh"
#include "attention/decode_scheduler.cuh"
#include "attention/softcap.cuh"
#include "attention/softmax.cuh"
#include "device/barrier.cuh"
#include "device/shared.cuh"
#include "device/vector.cuh"

namespace fastgen::attention {

template <typename T, int kKeyDim, int kValueDim>
struct DecodeLayout {
  static constexpr Dims kDims = {kKeyDim, kValueDim};
  static constexpr DecodeShape kShape = decode_shape(kDims, sizeof(T));
  static constexpr int BLOCK_N = kShape.keys, kThreads = 32 * kShape.warps;
  using Key = Tile<T, kKeyDim>;
  using Value = Tile<T, kValueDim>;
  static constexpr int kQueryBytes = kDecodeRows * row_bytes(kKeyDim, sizeof(T));
  static constexpr int kKeyBytes = BLOCK_N * row_bytes(kKeyDim, sizeof(T));
  static constexpr int kStageBytes = kKeyBytes + BLOCK_N * row_bytes(kValueDim, sizeof(T));
  static constexpr int kSumsStride = kValueDim + kDecodeExtraFloats;

  static __device__ __forceinline__ Key query() { return {reinterpret_cast<T*>(device::dynamic_shared())}; }
  static __device__ __forceinline__ unsigned char* ring(int warp) {
    return device::dynamic_shared() + kQueryBytes + warp * kShape.stages * kStageBytes;
  }
  static __device__ __forceinline__ Key key(int warp, int stage) {
    return {reinterpret_cast<T*>(ring(warp) + stage * kStageBytes)};
  }
  static __device__ __forceinline__ Value value(int warp, int stage) {
    return {reinterpret_cast<T*>(ring(warp) + stage * kStageBytes + kKeyBytes)};
  }
  // Sums of a warp, in place of its ring.
  static __device__ __forceinline__ float* sums(int warp, int row) {
    return reinterpret_cast<float*>(ring(warp)) + row * kSumsStride;
  }
  // The maximum and the sum of weights of a warp's row; warp == warps: the inverse of the sum of all.
  static __device__ __forceinline__ float* state(int warps, int warp, int row) {
    return reinterpret_cast<float*>(ring(warps)) + (warp * kDecodeRows + row) * 2;
  }
};

// Starts the copy of kRows rows, as copy_rows, but by one warp. Bit i of ``live``: row i is valid, others are zeros.
template <int kRows, typename T, int kWidth>
__device__ __forceinline__ void copy_rows_by_warp(const Tile<T, kWidth>& tile, const T* source, int64_t stride,
                                                  int columns, uint32_t live) {
  constexpr int kChunk = Tile<T, kWidth>::kChunk, kChunks = kWidth / kChunk;
  constexpr int kSide = (kChunks & -kChunks) < 32 ? kChunks & -kChunks : 32, kDown = 32 / kSide;
  const int lane = threadIdx.x % 32;
  const int down = kSide >= 8 ? lane / kSide : lane % kDown, side = kSide >= 8 ? lane % kSide : lane / kDown;
  source += down * stride + side * kChunk;
#pragma unroll
  for (int row = 0; row < kRows; row += kDown) {
    if (kDown > kRows && down >= kRows) break;
    const bool valid = (live >> (row + down) & 1) != 0;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += kSide) {
      const int column = chunk * kChunk;
      device::async_copy<16>(tile.at(row + down, column + side * kChunk), source + column,
                             valid && column + side * kChunk < columns ? 16 : 0);
    }
    source += kDown * stride;
  }
}

// Writes a row of sums and its state: to out and lse, or if there are several splits to the workspace.
template <typename T>
struct DecodeResult {
  const ForwardParams& p;
  const DecodeBlock& block;

  __device__ __forceinline__ bool is_last() const { return p.splits == 1; }
  // Four columns; the row's inverse is not used for a part.
  __device__ __forceinline__ void store(const PackedRow& row, int column, float (&sums)[4], float inverse) const {
    if (!is_last()) {
      float* parts = p.parts + (blockIdx.y * rows() + row.index(p.problem, block)) * p.problem.value_dim;
      device::store_vector(parts + column, sums);
      return;
    }
#pragma unroll
    for (float& sum : sums) sum *= inverse;
    store_four(row_pointer<T>(p.out, block.batch, row.head, row.query) + column, sums);
  }
  __device__ __forceinline__ void store_state(const PackedRow& row, const Softmax& softmax) const {
    if (is_last()) {
      *row_pointer(p.lse, block.batch, row.head, row.query) = softmax.lse(0);
      return;
    }
    float* state = p.parts + p.splits * rows() * p.problem.value_dim;
    state += (blockIdx.y * rows() + row.index(p.problem, block)) * 2;
    state[0] = softmax.row_max[0], state[1] = softmax.row_sum[0];
  }

 private:
  __device__ __forceinline__ int64_t rows() const {
    return int64_t{p.problem.batch} * p.problem.heads * p.problem.queries;
  }
};

// Compiled once: reading keys and values takes the time, and without a mask a tile takes as many instructions as in a
// kernel that has none.
template <typename T, int kKeyDim, int kValueDim>
__global__ void __launch_bounds__(DecodeLayout<T, kKeyDim, kValueDim>::kThreads, 1) attention_decode(ForwardParams p) {
  using Layout = DecodeLayout<T, kKeyDim, kValueDim>;
  constexpr int BLOCK_N = Layout::BLOCK_N, kStages = Layout::kShape.stages;
  constexpr int kTiles = BLOCK_N / 8, kColumnTiles = kValueDim / 8;
  using Tiles = WarpTiles<T, BLOCK_N>;
  using Index = typename Tiles::Index;
  const Problem& problem = p.problem;
  const int warp = uniform_warp(), warps = static_cast<int>(blockDim.x / 32);
  const DecodeBlock block(problem, blockIdx.x);

  const auto load_queries = [&] {
    constexpr int kChunk = Layout::Key::kChunk;
    const int row = static_cast<int>(threadIdx.x) % kDecodeRows, step = static_cast<int>(blockDim.x) / kDecodeRows;
    const PackedRow packed(problem, block, row);
    const T* const query = row_pointer<T>(p.query, block.batch, packed.head, packed.query);
    for (int i = static_cast<int>(threadIdx.x) / kDecodeRows; i < kKeyDim / kChunk; i += step) {
      const bool valid = row < block.rows && i * kChunk < problem.key_dim;
      device::async_copy<16>(Layout::query().at(row, i * kChunk), query + i * kChunk, valid ? 16 : 0);
    }
    device::async_copy_commit();
  };
  load_queries();

  const T* const keys = row_pointer<T>(p.key, block.batch, block.key_head, 0);
  const T* const values = row_pointer<T>(p.value, block.batch, block.key_head, 0);
  const auto load = [&](const Index& index, int stage) {
    if (index.exists()) {
      copy_rows_by_warp<BLOCK_N>(Layout::key(warp, stage), keys + index.key() * p.key.row, p.key.row, problem.key_dim,
                                 index.live);
      copy_rows_by_warp<BLOCK_N>(Layout::value(warp, stage), values + index.key() * p.value.row, p.value.row,
                                 problem.value_dim, index.live);
    }
    device::async_copy_commit();
  };
  Tiles tiles(problem, block, static_cast<int>(blockIdx.y) * warps + warp, static_cast<int>(gridDim.y) * warps);
  Index ahead[kStages - 1];
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    ahead[stage] = tiles.next();
    load(ahead[stage], stage);
  }
  const auto mask_row = [&](const PackedRow& row) {
    return MaskRow<T>(problem.mask, block.batch, row.head, row.query);
  };
  const auto window = [&](const PackedRow& row) {
    return keys_in_window(problem, {row.query, row.query + 1}, problem.keys);
  };
  const PackedRow upper(problem, block, lane_row()), lower(problem, block, lane_row() + 8);
  const PackedMask<T, BLOCK_N> mask = {{mask_row(upper), mask_row(lower)}, {window(upper), window(lower)}};
  device::async_copy_wait<kStages - 1>();
  device::sync_block();  // the queries

  Softmax softmax;
  float out[1][kColumnTiles][4] = {};
  const auto attend = [&](const Index& current, int stage) {
    const bool unmasked = tiles.is_unmasked(current);
    uint32_t visible = 0;
    if (!unmasked) visible = mask.visible(problem.mask, current.key(), current.live, tiles.is_mask_applied());
    if (!unmasked && !device::any_lane(visible != 0)) return;
    float scores[1][kTiles][4] = {};
    multiply_rows(scores, Layout::query(), 0, Layout::key(warp, stage), problem.exact);
    float factor = cap_scores<false>(scores, problem);
    if (!unmasked || !(factor > 0.0f)) {
      if (unmasked) visible = ~0u;
      mask.apply(problem.mask, scores, factor, visible, current.key(), !unmasked);
      factor = 1.0f;
    }
    float rescale[2];
    softmax.update(scores[0], factor, rescale);
    if (device::any_lane(rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
      for (auto& sums : out[0]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] *= rescale[i / 2];
      }
    }
    multiply_weights<T>(out, scores, Layout::value(warp, stage), 0, problem.exact, !unmasked,
                        unmasked ? 0 : mask.columns(visible));
  };
  for (int stage = 0; ahead[0].exists(); stage = stage + 1 == kStages ? 0 : stage + 1) {
    const Index current = ahead[0];
#pragma unroll
    for (int i = 1; i < kStages - 1; ++i) ahead[i - 1] = ahead[i];
    device::async_copy_wait<kStages - 2>();
    device::sync_warp();  // the copies of all lanes; and all have read the stage that is filled next
    ahead[kStages - 2] = tiles.next();
    load(ahead[kStages - 2], stage == 0 ? kStages - 1 : stage - 1);
    attend(current, stage);
  }

  softmax.finalize();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* state = Layout::state(warps, warp, half * 8 + lane_row());
    if (lane_column() == 0) state[0] = softmax.row_max[half], state[1] = softmax.row_sum[half];
  }
  device::sync_block();  // the states; and all lanes have read their ring
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = half * 8 + lane_row();
    float all = -INFINITY;
    for (int i = 0; i < warps; ++i) all = fmaxf(all, Layout::state(warps, i, row)[0]);
    const float factor = rescaled(softmax.row_max[half], all);
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      const uint32_t words[2] = {float_to_bits(out[0][tile][2 * half] * factor),
                                 float_to_bits(out[0][tile][2 * half + 1] * factor)};
      device::store_words(Layout::sums(warp, row) + tile * 8 + lane_column(), words);
    }
  }
  const DecodeResult<T> result = {p, block};
  if (threadIdx.x < kDecodeRows) {
    const int row = static_cast<int>(threadIdx.x);
    Softmax total;
    for (int i = 0; i < warps; ++i) total.row_max[0] = fmaxf(total.row_max[0], Layout::state(warps, i, row)[0]);
    for (int i = 0; i < warps; ++i) {
      const float* state = Layout::state(warps, i, row);
      total.row_sum[0] += state[1] * rescaled(state[0], total.row_max[0]);
    }
    *Layout::state(warps, warps, row) = total.inverse(0);
    if (row < block.rows) result.store_state(PackedRow(problem, block, row), total);
  }
  device::sync_block();
  constexpr int kFours = kValueDim / 4;
  for (int i = static_cast<int>(threadIdx.x); i < block.rows * kFours; i += static_cast<int>(blockDim.x)) {
    const int row = i / kFours, column = i % kFours * 4;
    if (column >= problem.value_dim) continue;
    float sums[4] = {};
    for (int j = 0; j < warps; ++j) {
      float part[4];
      device::load_vector(Layout::sums(j, row) + column, part);
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[k] += part[k];
    }
    result.store(PackedRow(problem, block, row), column, sums, *Layout::state(warps, warps, row));
  }
}

}  // namespace fastgen::attention
