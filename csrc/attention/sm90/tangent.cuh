// Forward-mode derivative for sm_90a: the mathematics of ../tangent.cuh with products of warpgroups and tiles copied by
// the tensor memory accelerator. W: tangent of the scores; Q', K', V': tangents of Q, K, V.
//
//   producer, one thread               consumers, one warpgroup for 64 queries each; for each query tile of the block
//   for each query tile                  S_0 = Q K_0^T, W_0 = Q' K_0^T + Q K'_0^T              P_0, P_0 W_0
//     copy Q, Q'                         for each further key tile i
//     for each key tile i                  S_i, W_i, O' += P_i-1 W_i-1 V_i-1 + P_i-1 V'_i-1    all in flight
//       copy K_i, K'_i, V_i, V'_i          P_i, P_i W_i                                        beside the second
//                                        O' += P_n W_n V_n + P_n V'_n
//                                        w = rowsum(P W), out' = O' - w out, lse' = w
//
// Key tiles that the window or the padding excludes for the whole query tile are neither copied nor computed. gridDim =
// blocks of a persistent grid.
#pragma once

#include "attention/sm90/backward_pipeline.cuh"
#include "attention/sm90/forward.cuh"
#include "attention/sm90/tangent_plan.h"
#include "common/reduce.cuh"

namespace fastgen::attention::sm90 {

struct TangentMaps {
  device::TensorMap query, key, value, tangent_query, tangent_key, tangent_value;
};

template <int kHeadDim, int kKeyCount, int kStageCount>
struct TangentTiles {
  static constexpr int kDim = kHeadDim, kKeys = kKeyCount, kStages = kStageCount, kPanels = kDim / kPanelDim;
  static_assert(kStages <= kMostStages, "a barrier for each stage");
  static constexpr int kQueryBytes = tile_bytes(BLOCK_M, kDim), kKeyBytes = tile_bytes(kKeys, kDim);
  static constexpr int kTiles = kKeys / 8, kDepths = kKeys / device::kWgmmaDepth;

  static __device__ __forceinline__ unsigned char* query() { return device::dynamic_shared(); }
  static __device__ __forceinline__ unsigned char* tangent_query() { return query() + kQueryBytes; }
  static __device__ __forceinline__ unsigned char* key(int stage) {
    return query() + 2 * kQueryBytes + 4 * stage * kKeyBytes;
  }
  static __device__ __forceinline__ unsigned char* tangent_key(int stage) { return key(stage) + kKeyBytes; }
  static __device__ __forceinline__ unsigned char* value(int stage) { return key(stage) + 2 * kKeyBytes; }
  static __device__ __forceinline__ unsigned char* tangent_value(int stage) { return key(stage) + 3 * kKeyBytes; }

  // both = S, W of the consumer's 64 queries.
  template <typename T>
  static __device__ __forceinline__ void multiply_keys(float (&both)[2][1][kTiles][4], int group, int stage) {
    const auto add = [&](float (&to)[kTiles][4], unsigned char* queries, unsigned char* keys, bool first) {
      const auto query = device::matrix_tile<device::Rows::kOuter>(queries + group * panel_bytes(kGroupRows));
      const auto key = device::matrix_tile<device::Rows::kOuter>(keys);
#pragma unroll
      for (int k = 0; k < kDim; k += device::kWgmmaDepth) {
        const int panel = k / kPanelDim, across = k % kPanelDim * static_cast<int>(sizeof(T));
        device::wgmma<T>(to, query.from(panel * panel_bytes(BLOCK_M) + across),
                         key.from(panel * panel_bytes(kKeys) + across), !first || k > 0);
      }
    };
    add(both[0][0], query(), key(stage), true);
    add(both[1][0], tangent_query(), key(stage), true);
    add(both[1][0], query(), tangent_key(stage), false);
    device::wgmma_commit();
  }

  // sums += weights values, of the kDepths weights from ``first`` on.
  template <typename T>
  static __device__ __forceinline__ void multiply_values(float (&sums)[kDim / 8][4],
                                                         const uint32_t (&weights)[2 * kDepths][4], int first,
                                                         unsigned char* values) {
    const auto value = device::matrix_tile<device::Rows::kDepth>(values, panel_bytes(kKeys));
#pragma unroll
    for (int k = 0; k < kDepths; ++k) {
      device::wgmma<T>(sums, weights[first + k], value.from(k * device::kWgmmaDepth * kPanelRowBytes));
    }
  }

  // weights = P, P W as left operands of products.
  template <typename T>
  static __device__ __forceinline__ void pack_weights(uint32_t (&weights)[2 * kDepths][4],
                                                      const float (&both)[2][1][kTiles][4]) {
#pragma unroll
    for (int k = 0; k < kDepths; ++k) {
      Product<T>::from_scores(weights[k], both[0][0] + 2 * k);
      Product<T>::from_scores(weights[kDepths + k], both[1][0] + 2 * k);
    }
  }
};
template <int kDim, bool kPadded>
using TilesOfTangent =
    TangentTiles<kDim, tangent_shape90(kDim, kPadded).iterated, tangent_shape90(kDim, kPadded).key_stages>;

// The copies of all tiles of the block, by one thread; with padding its whole warp finds them.
template <typename T, typename Tiles, bool kPadded>
__device__ __forceinline__ void produce_with_tangents(const TangentMaps& maps, const Problem& problem,
                                                      const Schedule& schedule, BackwardBarriers& barriers) {
  using TangentWork = Work<T, kPadded, BLOCK_M, Tiles::kKeys>;
  // An operand and its tangent, in successive tiles.
  const auto copy = [](unsigned char* tile, const device::TensorMap& map, const device::TensorMap& tangent, int rows,
                       int row, unsigned head, unsigned batch, device::Mbarrier* full) {
    device::mbarrier_arrive_expect(full, 2 * tile_bytes(rows, Tiles::kDim));
#pragma unroll
    for (int panel = 0; panel < Tiles::kPanels; ++panel) {
      const int at[] = {panel * kPanelDim, row, static_cast<int>(head), static_cast<int>(batch)};
      device::tensor_load(tile + panel * panel_bytes(rows), map, at, full);
      device::tensor_load(tile + tile_bytes(rows, Tiles::kDim) + panel * panel_bytes(rows), tangent, at, full);
    }
  };
  Position<Tiles::kStages> position;
  int parity = 0;  // of the query tile
  for (int64_t i = blockIdx.x; i < schedule.tiles; i += gridDim.x) {
    const TangentWork work(problem, schedule, i);
    const QueryBlock& block = work.block;
    typename TangentWork::Tile tile = work.first();
    if (!work.contains(tile)) continue;
    if (threadIdx.x == 0) {
      device::mbarrier_wait(&barriers.owned_empty, parity ^ 1);
      copy(Tiles::query(), maps.query, maps.tangent_query, BLOCK_M, block.queries.begin, block.head, block.batch,
           &barriers.owned_full);
    }
    parity ^= 1;
    for (; work.contains(tile); tile = work.next(tile), position.advance()) {
      if (threadIdx.x != 0) continue;
      const int stage = position.stage;
      device::mbarrier_wait(&barriers.key_empty[stage], position.parity ^ 1);
      copy(Tiles::key(stage), maps.key, maps.tangent_key, Tiles::kKeys, tile.key(), block.key_head, block.key_batch,
           &barriers.key_full[stage]);
      device::mbarrier_wait(&barriers.value_empty[stage], position.parity ^ 1);
      copy(Tiles::value(stage), maps.value, maps.tangent_value, Tiles::kKeys, tile.key(), block.key_head,
           block.key_batch, &barriers.value_full[stage]);
    }
  }
}

template <typename T, int kDim, bool kPadded>
__device__ __forceinline__ void compute_tangent(const TangentParams& p, const Schedule& schedule,
                                                BackwardBarriers& barriers) {
  using Tiles = TilesOfTangent<kDim, kPadded>;
  using TangentWork = Work<T, kPadded, BLOCK_M, Tiles::kKeys>;
  using Tile = typename TangentWork::Tile;
  constexpr int kKeys = Tiles::kKeys, kTiles = Tiles::kTiles, kDepths = Tiles::kDepths;
  const Problem& problem = p.problem;
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads - 1;
  const int warp_row = group * kGroupRows + static_cast<int>(threadIdx.x % kGroupThreads) / 32 * kFragmentRows;

  float both[2][1][kTiles][4];  // of the newest key tile: S, then P; W, then P W
  auto &scores = both[0], &direction = both[1];
  uint32_t weights[2 * kDepths][4];   // P, then P W of the tile before
  float sums[1][kDim / 8][4];         // O'
  Position<Tiles::kStages> position;  // of the newest key tile
  int parity = 0;                     // of the query tile

  const auto multiply_values = [&](int stage) {
    Tiles::template multiply_values<T>(sums[0], weights, 0, Tiles::tangent_value(stage));
    Tiles::template multiply_values<T>(sums[0], weights, kDepths, Tiles::value(stage));
    device::wgmma_commit();
  };

  for (int64_t i = blockIdx.x; i < schedule.tiles; i += gridDim.x) {
    const TangentWork work(problem, schedule, i);
    const QueryBlock& block = work.block;
    const int row = block.queries.begin + warp_row, warp_rows = block.rows() - warp_row;
    const Band window = Band::of<false>(problem, row);
    float shift[2], mean[2] = {0.0f, 0.0f};  // mean: w, of this lane's keys
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int down = half * 8 + lane_row();
      const float* lse = row_pointer(p.lse, block.batch, block.head, row + down);
      shift[half] = weight_shift(down < warp_rows ? kLog2e * *lse : -INFINITY);
    }
#pragma unroll
    for (int columns = 0; columns < kDim / 8; ++columns) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[0][columns][e] = 0.0f;
    }

    const auto weigh = [&](const Tile& tile) {
      const Band band = window.from(tile.key());
      const bool masked = !work.is_whole(tile) || !band.covers(kFragmentRows, kKeys);
      const float factor = mask_scores(scores[0], problem.scale * kLog2e, masked, band, work, tile);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[0][n][e] = weight(scores[0][n][e], factor, shift[e / 2]);
      }
      if (masked) clear_where_zero(direction, scores);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          direction[0][n][e] *= problem.scale * scores[0][n][e];
          mean[e / 2] += direction[0][n][e];
        }
      }
    };
    const auto wait_for_values = [&](const Position<Tiles::kStages>& at, const Tile& tile) {
      device::mbarrier_wait(&barriers.value_full[at.stage], at.parity);
      if (!work.is_whole(tile)) {
        clear_unused_values<2 * kDim>(Tiles::value(at.stage), work, tile);  // and those of their tangents
      }
    };

    Tile tile = work.first();
    if (work.contains(tile)) {
      device::mbarrier_wait(&barriers.owned_full, parity);
      parity ^= 1;
      device::mbarrier_wait(&barriers.key_full[position.stage], position.parity);
      device::wgmma_fence(both);
      Tiles::template multiply_keys<T>(both, group, position.stage);
      device::wgmma_wait<0>(both);
      leave(&barriers.key_empty[position.stage]);
      weigh(tile);
      Tiles::template pack_weights<T>(weights, both);

      for (Tile next = work.next(tile); work.contains(next); next = work.next(tile)) {
        const Position<Tiles::kStages> last = position;
        position.advance();
        wait_for_values(last, tile);
        tile = next;
        device::mbarrier_wait(&barriers.key_full[position.stage], position.parity);
        device::wgmma_fence(both, sums[0], weights);
        Tiles::template multiply_keys<T>(both, group, position.stage);
        multiply_values(last.stage);
        device::wgmma_wait<1>(both);
        leave(&barriers.key_empty[position.stage]);
        weigh(tile);
        device::hold_registers(both);
        device::compute_before_wait(fabsf(mean[0]) + fabsf(mean[1]));
        device::wgmma_wait<0>(sums[0], weights);
        leave(&barriers.value_empty[last.stage]);
        Tiles::template pack_weights<T>(weights, both);
      }
      leave(&barriers.owned_empty);
      wait_for_values(position, tile);
      device::wgmma_fence(sums[0], weights);
      multiply_values(position.stage);
      device::wgmma_wait<0>(sums[0], weights);
      leave(&barriers.value_empty[position.stage]);
      position.advance();
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      mean[half] = team_sum(mean[half], 4);
      const int down = half * 8 + lane_row();
      if (down >= warp_rows) continue;
      if (lane_column() == 0) *row_pointer(p.tangent_lse, block.batch, block.head, row + down) = mean[half];
      const T* out = row_pointer<T>(p.out, block.batch, block.head, row + down);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const int column = 8 * n + lane_column();
        if (column >= problem.value_dim) continue;  // a multiple of 8
#pragma unroll
        for (int e = 0; e < 2; ++e) sums[0][n][2 * half + e] -= mean[half] * device::to_float(out[column + e]);
      }
    }
    const float ones[1][2] = {{1.0f, 1.0f}};
    store_rows(row_pointer<T>(p.tangent_out, block.batch, block.head, row), p.tangent_out.row, warp_rows,
               problem.value_dim, ones, sums);
  }
}

// kPadded: with a boolean mask of keys.
template <typename T, int kDim, bool kPadded>
__global__ void __launch_bounds__(kThreads, 1)
    attention_tangent_sm90(const __grid_constant__ TangentMaps maps, const __grid_constant__ TangentParams p,
                           const __grid_constant__ Schedule schedule) {
  BackwardBarriers& barriers = device::shared_variable<BackwardBarriers>();
  if (threadIdx.x == 0) initialize(barriers, tangent_shape90(kDim, kPadded), false);
  device::sync_block();
  constexpr Registers kRegisters = kPadded ? kPaddedRegisters : kPlainRegisters;
  if (threadIdx.x < kGroupThreads) {
    device::decrease_registers<kRegisters.producer>();
    if (threadIdx.x < (kPadded ? 32 : 1)) {
      produce_with_tangents<T, TilesOfTangent<kDim, kPadded>, kPadded>(maps, p.problem, schedule, barriers);
    }
  } else {
    device::increase_registers<kRegisters.consumer>();
    compute_tangent<T, kDim, kPadded>(p, schedule, barriers);
  }
}

}  // namespace fastgen::attention::sm90
