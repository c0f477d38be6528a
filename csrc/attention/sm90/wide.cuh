// Forward pass of head dim 512 for sm_90a: 64 queries of a block, whose output, 512 columns, is too wide for the
// registers of one warpgroup. Two have half of the columns each, and one of them the scores, so that each is computed
// once.
//
//   producer, one thread      scores, and columns 0 ... 255              columns 256 ... 511
//   for each query tile       for each query tile of the block
//     copy Q                    S_0 = Q K_0^T: P_0, to shared memory
//     for each key tile i       for each further key tile i                for each key tile i
//       copy K_i, V_i             S_i = Q K_i^T, O += P_i-1 V_i-1            O *= 2^(m - m'), O += P_i V_i
//                                 P_i beside the second, O *= 2^(m - m')
//                                 P_i and 2^(m - m') to shared memory
//                               O += P_n V_n, l to shared memory           out = O / l
//
// K is copied during the products with V, and V during those with K. The keys of a query tile may be split over blocks,
// whose parts attention_combine adds: ../wide.cuh. gridDim = (blocks of a persistent grid, splits).
#pragma once

#include "attention/sm90/forward.cuh"
#include "attention/sm90/wide_plan.h"

namespace fastgen::attention::sm90 {

struct WideTiles {
  static constexpr int kPanels = kWideDim / kPanelDim, kHalfPanels = kPanels / 2;
  static constexpr int kTileBytes = tile_bytes(kWideKeys, kWideDim);
  static constexpr int kPartDim = 128, kParts = kWideDim / 2 / kPartDim;  // of a consumer's columns
  static constexpr int kTiles = kWideKeys / 8, kDepths = kWideKeys / device::kWgmmaDepth;
  static_assert(kWideKeys == kGroupRows, "the tiles of Q, K and V have one size");

  static __device__ __forceinline__ unsigned char* query() { return device::dynamic_shared(); }
  static __device__ __forceinline__ unsigned char* key() { return query() + kTileBytes; }
  static __device__ __forceinline__ unsigned char* value() { return query() + 2 * kTileBytes; }
  static __device__ __forceinline__ unsigned char* weights() { return query() + 3 * kTileBytes; }
  // Of each query: what the output is multiplied by next.
  static __device__ __forceinline__ float* factors() { return reinterpret_cast<float*>(weights() + kWideWeightBytes); }

  // The weights of 16 queries, left operands of products, as tensor_load lays out a tile: the 16-byte chunks of a row
  // in the order chunk ^ row % 8.
  static __device__ __forceinline__ void store_weights(int warp_row, const uint32_t (&left)[kDepths][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + half * 8 + lane_row();
      unsigned char* const of_row = weights() + row * kPanelRowBytes + lane_column() * 2;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        *reinterpret_cast<uint32_t*>(of_row + ((tile ^ row % 8) << 4)) = left[tile / 2][tile % 2 * 2 + half];
      }
    }
  }
  static __device__ __forceinline__ void store_factors(int warp_row, const float (&of_rows)[2]) {
    if (lane_column() != 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) factors()[warp_row + half * 8 + lane_row()] = of_rows[half];
  }
  static __device__ __forceinline__ void load_factors(int warp_row, float (&of_rows)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) of_rows[half] = factors()[warp_row + half * 8 + lane_row()];
  }
};

// A query tile and the block's split of its keys.
template <typename T>
struct WideWork : Work<T, false, kGroupRows, kWideKeys> {
  __device__ __forceinline__ WideWork(const ForwardParams& p, const Schedule& schedule, int64_t i)
      : Work<T, false, kGroupRows, kWideKeys>(p.problem, schedule, i) {
    if (p.splits == 1) return;
    const int each = (this->end_tile - this->first_tile + p.splits - 1) / p.splits;
    this->first_tile += static_cast<int>(blockIdx.y) * each;
    this->end_tile = smaller(this->end_tile, this->first_tile + each);
  }
};

// By one thread; the block has to synchronize after it. The first consumer alone reads Q and K.
__device__ __forceinline__ void initialize_wide(Barriers& barriers) {
  constexpr int kGroupWarps = kGroupThreads / 32;
  device::mbarrier_init(&barriers.query_full[0], 1);
  device::mbarrier_init(&barriers.query_empty[0], kGroupWarps);
  device::mbarrier_init(&barriers.key_full[0], 1);
  device::mbarrier_init(&barriers.key_empty[0], kGroupWarps);
  device::mbarrier_init(&barriers.value_full[0], 1);
  device::mbarrier_init(&barriers.value_empty[0], 2 * kGroupWarps);
  device::fence_mbarrier_init();
}

template <typename T>
__device__ __forceinline__ void produce_wide(const ForwardMaps& maps, const ForwardParams& p, const Schedule& schedule,
                                             Barriers& barriers) {
  const auto copy = [](unsigned char* tile, const device::TensorMap& map, int row, unsigned head, unsigned batch,
                       device::Mbarrier* full) {
    device::mbarrier_arrive_expect(full, WideTiles::kTileBytes);
#pragma unroll
    for (int panel = 0; panel < WideTiles::kPanels; ++panel) {
      const int at[] = {panel * kPanelDim, row, static_cast<int>(head), static_cast<int>(batch)};
      device::tensor_load(tile + panel * panel_bytes(kWideKeys), map, at, full);
    }
  };
  int query_parity = 0, parity = 0;
  for (int64_t i = blockIdx.x; i < schedule.tiles; i += gridDim.x) {
    const WideWork<T> work(p, schedule, i);
    const QueryBlock& block = work.block;
    auto tile = work.first();
    if (!work.contains(tile)) continue;
    device::mbarrier_wait(&barriers.query_empty[0], query_parity ^ 1);
    copy(WideTiles::query(), maps.query, block.queries.begin, block.head, block.batch, &barriers.query_full[0]);
    query_parity ^= 1;
    for (; work.contains(tile); tile = work.next(tile), parity ^= 1) {
      device::mbarrier_wait(&barriers.key_empty[0], parity ^ 1);
      copy(WideTiles::key(), maps.key, tile.key(), block.key_head, block.key_batch, &barriers.key_full[0]);
      device::mbarrier_wait(&barriers.value_empty[0], parity ^ 1);
      copy(WideTiles::value(), maps.value, tile.key(), block.key_head, block.key_batch, &barriers.value_full[0]);
    }
  }
}

// Named barriers. The weights and factors in shared memory: the second consumer has left them; the first has written.
constexpr int kWeightsEmpty = 1, kWeightsFull = 2, kWideClearBarrier = 3;  // the last: and the next, one each

// Columns of half the output, a fragment for each 128.
using WideSums = float[WideTiles::kParts][1][WideTiles::kPartDim / 8][4];

__device__ __forceinline__ void multiply_wide(WideSums& sums, const float (&factors)[2]) {
#pragma unroll
  for (auto& part : sums) {
#pragma unroll
    for (auto& columns : part[0]) {
#pragma unroll
      for (int e = 0; e < 4; ++e) columns[e] *= factors[e / 2];
    }
  }
}

// 0. Descriptors that depend on it are computed in each iteration: ptxas would keep all of them in registers.
__device__ __forceinline__ int no_bytes(const KeyTile<false, kWideKeys>& tile) {
  return tile.index < 0 ? device::kSwizzleRepeatBytes : 0;
}

// sums += P V of the consumer's columns. left(k): 16 keys of P.
template <typename T, typename Left>
__device__ __forceinline__ void multiply_wide_values(WideSums& sums, int group, const KeyTile<false, kWideKeys>& tile,
                                                     const Left& left) {
  const auto value =
      device::matrix_tile<device::Rows::kDepth>(WideTiles::value() + no_bytes(tile), panel_bytes(kWideKeys));
#pragma unroll
  for (int k = 0; k < WideTiles::kDepths; ++k) {
#pragma unroll
    for (int part = 0; part < WideTiles::kParts; ++part) {
      const int panel = part * WideTiles::kPartDim / kPanelDim;
      device::wgmma<T>(sums[part][0], left(k),
                       value.from((group * WideTiles::kHalfPanels + panel) * panel_bytes(kWideKeys) +
                                  k * device::kWgmmaDepth * kPanelRowBytes));
    }
  }
  device::wgmma_commit();
}

// Waits for V. The consumer's columns of values that no query of the block attends to become zeros: forward.cuh.
template <typename T>
__device__ __forceinline__ void wait_for_wide_values(Barriers& barriers, int parity, int group, const WideWork<T>& work,
                                                     const KeyTile<false, kWideKeys>& tile) {
  device::mbarrier_wait(&barriers.value_full[0], parity);
  if (work.is_whole(tile)) return;
  constexpr int kChunks = kPanelRowBytes / device::kVectorBytes;
  unsigned char* const values = WideTiles::value() + group * WideTiles::kHalfPanels * panel_bytes(kWideKeys);
  for (int chunk = static_cast<int>(threadIdx.x) % kGroupThreads; chunk < kWideKeys * kChunks; chunk += kGroupThreads) {
    if (work.is_live(tile, chunk / kChunks)) continue;
#pragma unroll
    for (int panel = 0; panel < WideTiles::kHalfPanels; ++panel) {
      constexpr uint32_t kZeros[4] = {};
      device::store_vector(
          reinterpret_cast<uint32_t*>(values + panel * panel_bytes(kWideKeys) + chunk * device::kVectorBytes), kZeros);
    }
  }
  device::fence_async_proxy();
  device::sync_named(kWideClearBarrier + group, kGroupThreads);
}

// out = sums * factors, or this split's part of it.
template <typename T>
__device__ __forceinline__ void store_wide(const ForwardParams& p, const WideWork<T>& work, int group, int row,
                                           int warp_rows, const WideSums& sums, const float (&of_rows)[2]) {
  const Problem& problem = p.problem;
  const QueryBlock& block = work.block;
  const float factors[1][2] = {{of_rows[0], of_rows[1]}};
  const int64_t all_rows = int64_t{problem.batch} * problem.heads * problem.queries;
  const int64_t first_row = blockIdx.y * all_rows + block.first_row;
#pragma unroll
  for (int part = 0; part < WideTiles::kParts; ++part) {
    const int column = group * (kWideDim / 2) + part * WideTiles::kPartDim;
    if (p.splits > 1) {
      store_rows(p.parts + (first_row + row) * problem.value_dim + column, problem.value_dim, warp_rows,
                 problem.value_dim - column, factors, sums[part]);
    } else {
      store_rows(row_pointer<T>(p.out, block.batch, block.head, row) + column, p.out.row, warp_rows,
                 problem.value_dim - column, factors, sums[part]);
    }
  }
}

// The first consumer.
template <typename T>
__device__ __forceinline__ void consume_with_scores(const ForwardParams& p, const Schedule& schedule,
                                                    Barriers& barriers) {
  using device::Rows;
  const Problem& problem = p.problem;
  const int warp_row = static_cast<int>(threadIdx.x % kGroupThreads) / 32 * kFragmentRows;
  float scores[WideTiles::kTiles][4];       // of the newest key tile
  uint32_t weights[WideTiles::kDepths][4];  // P of the one before
  WideSums out;
  int query_parity = 0, parity = 0;  // of the query tile, of the newest key tile

  const auto multiply_keys = [&](const KeyTile<false, kWideKeys>& tile) {
    const auto query = device::matrix_tile<Rows::kOuter>(WideTiles::query() + no_bytes(tile));
    const auto key = device::matrix_tile<Rows::kOuter>(WideTiles::key() + no_bytes(tile));
#pragma unroll
    for (int k = 0; k < kWideDim; k += device::kWgmmaDepth) {
      const int at = k / kPanelDim * panel_bytes(kWideKeys) + k % kPanelDim * static_cast<int>(sizeof(T));
      device::wgmma<T>(scores, query.from(at), key.from(at), k > 0);
    }
    device::wgmma_commit();
  };
  const auto left = [&](int k) -> const uint32_t (&)[4] { return weights[k]; };
  const auto hand_over = [&](const float (&factors)[2], bool with_weights) {
    device::sync_named(kWeightsEmpty, 2 * kGroupThreads);
    if (with_weights) WideTiles::store_weights(warp_row, weights);
    WideTiles::store_factors(warp_row, factors);
    device::fence_async_proxy();
    device::arrive_named(kWeightsFull, 2 * kGroupThreads);
  };

  for (int64_t i = blockIdx.x; i < schedule.tiles; i += gridDim.x) {
    const WideWork<T> work(p, schedule, i);
    const QueryBlock& block = work.block;
    const int row = block.queries.begin + warp_row, warp_rows = block.rows() - warp_row;
    const Band window = Band::of<false>(problem, row);
    Softmax softmax;
#pragma unroll
    for (auto& part : out) {
#pragma unroll
      for (auto& columns : part[0]) {
#pragma unroll
        for (float& sum : columns) sum = 0.0f;
      }
    }
    const auto apply_softmax = [&](const KeyTile<false, kWideKeys>& tile, float (&rescale)[2]) {
      const Band band = window.from(tile.key());
      const bool masked = !work.is_whole(tile) || !band.covers(kFragmentRows, kWideKeys);
      const float factor = mask_scores(scores, problem.scale * kLog2e, masked, band, work, tile);
      softmax.update(scores, factor, rescale);
    };
    const auto pack_weights = [&] {
#pragma unroll
      for (int k = 0; k < WideTiles::kDepths; ++k) Product<T>::from_scores(weights[k], scores + 2 * k);
    };

    auto tile = work.first();
    if (work.contains(tile)) {
      float rescale[2];
      device::mbarrier_wait(&barriers.query_full[0], query_parity);
      query_parity ^= 1;
      device::mbarrier_wait(&barriers.key_full[0], parity);
      device::wgmma_fence(scores);
      multiply_keys(tile);
      device::wgmma_wait<0>(scores);
      leave(&barriers.key_empty[0]);
      apply_softmax(tile, rescale);
      pack_weights();
      hand_over(rescale, true);

      for (auto next = work.next(tile); work.contains(next); next = work.next(tile)) {
        wait_for_wide_values(barriers, parity, 0, work, tile);
        parity ^= 1;
        tile = next;
        device::mbarrier_wait(&barriers.key_full[0], parity);
        device::wgmma_fence(scores, out, weights);
        multiply_keys(tile);
        multiply_wide_values<T>(out, 0, tile, left);
        device::wgmma_wait<1>(scores);
        leave(&barriers.key_empty[0]);
        apply_softmax(tile, rescale);
        device::hold_registers(scores);
        device::compute_before_wait(softmax.row_sum[0] + softmax.row_sum[1]);
        device::wgmma_wait<0>(out, weights);
        leave(&barriers.value_empty[0]);
        pack_weights();
        hand_over(rescale, true);
        multiply_wide(out, rescale);
      }
      leave(&barriers.query_empty[0]);
      wait_for_wide_values(barriers, parity, 0, work, tile);
      parity ^= 1;
      device::wgmma_fence(out, weights);
      multiply_wide_values<T>(out, 0, tile, left);
      device::wgmma_wait<0>(out, weights);
      leave(&barriers.value_empty[0]);
    }

    softmax.finalize();
    const bool split = p.splits > 1;
    const float factors[2] = {split ? 1.0f : softmax.inverse(0), split ? 1.0f : softmax.inverse(1)};
    hand_over(factors, false);
    const int64_t all_rows = int64_t{problem.batch} * problem.heads * problem.queries;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int down = half * 8 + lane_row();
      if (down >= warp_rows || lane_column() != 0) continue;
      if (split) {
        float* const state = p.parts + p.splits * all_rows * problem.value_dim +
                             (blockIdx.y * all_rows + block.first_row + row + down) * 2;
        state[0] = softmax.row_max[half], state[1] = softmax.row_sum[half];
      } else {
        *row_pointer(p.lse, block.batch, block.head, row + down) = softmax.lse(half);
      }
    }
    store_wide(p, work, 0, row, warp_rows, out, factors);
  }
}

// The second consumer.
template <typename T>
__device__ __forceinline__ void consume_weights(const ForwardParams& p, const Schedule& schedule, Barriers& barriers) {
  const int warp_row = static_cast<int>(threadIdx.x % kGroupThreads) / 32 * kFragmentRows;
  WideSums out;
  float factors[2];
  int parity = 0;
  const auto weights = device::matrix_tile<device::Rows::kOuter>(WideTiles::weights());
  const auto left = [&](int k) { return weights.from(k * device::kWgmmaDepth * static_cast<int>(sizeof(T))); };

  device::arrive_named(kWeightsEmpty, 2 * kGroupThreads);
  for (int64_t i = blockIdx.x; i < schedule.tiles; i += gridDim.x) {
    const WideWork<T> work(p, schedule, i);
    const int row = work.block.queries.begin + warp_row, warp_rows = work.block.rows() - warp_row;
#pragma unroll
    for (auto& part : out) {
#pragma unroll
      for (auto& columns : part[0]) {
#pragma unroll
        for (float& sum : columns) sum = 0.0f;
      }
    }
    for (auto tile = work.first(); work.contains(tile); tile = work.next(tile), parity ^= 1) {
      device::sync_named(kWeightsFull, 2 * kGroupThreads);
      WideTiles::load_factors(warp_row, factors);
      multiply_wide(out, factors);
      wait_for_wide_values(barriers, parity, 1, work, tile);
      device::wgmma_fence(out);
      multiply_wide_values<T>(out, 1, tile, left);
      device::wgmma_wait<0>(out);
      leave(&barriers.value_empty[0]);
      device::arrive_named(kWeightsEmpty, 2 * kGroupThreads);
    }
    device::sync_named(kWeightsFull, 2 * kGroupThreads);
    WideTiles::load_factors(warp_row, factors);
    device::arrive_named(kWeightsEmpty, 2 * kGroupThreads);
    store_wide(p, work, 1, row, warp_rows, out, factors);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    attention_forward_wide_sm90(const __grid_constant__ ForwardMaps maps, const __grid_constant__ ForwardParams p,
                                const __grid_constant__ Schedule schedule) {
  Barriers& barriers = device::shared_variable<Barriers>();
  if (threadIdx.x == 0) initialize_wide(barriers);
  device::sync_block();
  if (threadIdx.x < kGroupThreads) {
    device::decrease_registers<kPlainRegisters.producer>();
    if (threadIdx.x == 0) produce_wide<T>(maps, p, schedule, barriers);
  } else {
    device::increase_registers<kPlainRegisters.consumer>();
    if (threadIdx.x < 2 * kGroupThreads) {
      consume_with_scores<T>(p, schedule, barriers);
    } else {
      consume_weights<T>(p, schedule, barriers);
    }
  }
}

}  // namespace fastgen::attention::sm90
