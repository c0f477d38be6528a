// Output and forward-mode derivative in one sweep for sm_90a: tangent.cuh with the running softmax of forward.cuh. Six
// products, where the two kernels have seven.
//
//   consumers, one warpgroup for 64 queries each; for each query tile of the block
//     S_0 = Q K_0^T, W_0 = Q' K_0^T + Q K'_0^T                          P_0, P_0 W_0
//     for each further key tile i
//       S_i, W_i; O += P_i-1 V_i-1, O' += P_i-1 V'_i-1 + P_i-1 W_i-1 V_i-1    all in flight
//       P_i, P_i W_i                                                          beside the second
//       O, O', w *= 2^(m - m')
//     the products of the last tile; l = rowsum(P), w = rowsum(P W) / l
//     out = O / l, lse = m + log l, out' = O' / l - w out, lse' = w
//
// The producer is that of tangent.cuh. gridDim = blocks of a persistent grid.
#pragma once

#include "attention/sm90/tangent.cuh"
#include "attention/sm90/tangent_launcher.h"

namespace fastgen::attention::sm90 {

template <int kDim, bool kPadded>
using TilesOfForwardTangent =
    TangentTiles<kDim, forward_tangent_shape(kPadded).iterated, forward_tangent_shape(kPadded).key_stages>;

template <typename T, int kDim, bool kPadded>
__device__ __forceinline__ void compute_with_tangent(const ForwardTangentParams& p, const Schedule& schedule,
                                                     BackwardBarriers& barriers) {
  using Tiles = TilesOfForwardTangent<kDim, kPadded>;
  using TangentWork = Work<T, kPadded, BLOCK_M, Tiles::kKeys>;
  using Tile = typename TangentWork::Tile;
  constexpr int kKeys = Tiles::kKeys, kTiles = Tiles::kTiles, kDepths = Tiles::kDepths;
  const Problem& problem = p.problem;
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads - 1;
  const int warp_row = group * kGroupRows + static_cast<int>(threadIdx.x % kGroupThreads) / 32 * kFragmentRows;

  float both[2][1][kTiles][4];  // of the newest key tile: S, then P; W, then P W
  auto &scores = both[0], &direction = both[1];
  uint32_t weights[2 * kDepths][4];   // P, then P W of the tile before
  float sums[2][1][kDim / 8][4];      // O, O'
  Position<Tiles::kStages> position;  // of the newest key tile
  int parity = 0;                     // of the query tile

  const auto multiply_values = [&](int stage) {
    Tiles::template multiply_values<T>(sums[0][0], weights, 0, Tiles::value(stage));
    Tiles::template multiply_values<T>(sums[1][0], weights, 0, Tiles::tangent_value(stage));
    Tiles::template multiply_values<T>(sums[1][0], weights, kDepths, Tiles::value(stage));
    device::wgmma_commit();
  };

  for (int64_t i = blockIdx.x; i < schedule.tiles; i += gridDim.x) {
    const TangentWork work(problem, schedule, i);
    const QueryBlock& block = work.block;
    const int row = block.queries.begin + warp_row, warp_rows = block.rows() - warp_row;
    const Band window = Band::of<false>(problem, row);
    Softmax softmax;
    float mean[2] = {0.0f, 0.0f};  // w l, of this lane's keys
#pragma unroll
    for (int one = 0; one < 2; ++one) {
#pragma unroll
      for (int columns = 0; columns < kDim / 8; ++columns) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[one][0][columns][e] = 0.0f;
      }
    }

    // P and P W of a key tile, and the factors for earlier sums.
    const auto weigh = [&](const Tile& tile, float (&rescale)[2]) {
      const Band band = window.from(tile.key());
      const bool masked = !work.is_whole(tile) || !band.covers(kFragmentRows, kKeys);
      const float factor = mask_scores(scores[0], problem.scale * kLog2e, masked, band, work, tile);
      softmax.update(scores[0], factor, rescale);
      if (masked) clear_where_zero(direction, scores);
      mean[0] *= rescale[0], mean[1] *= rescale[1];
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
      float rescale[2];
      device::mbarrier_wait(&barriers.owned_full, parity);
      parity ^= 1;
      device::mbarrier_wait(&barriers.key_full[position.stage], position.parity);
      device::wgmma_fence(both);
      Tiles::template multiply_keys<T>(both, group, position.stage);
      device::wgmma_wait<0>(both);
      leave(&barriers.key_empty[position.stage]);
      weigh(tile, rescale);
      Tiles::template pack_weights<T>(weights, both);

      for (Tile next = work.next(tile); work.contains(next); next = work.next(tile)) {
        const Position<Tiles::kStages> last = position;
        position.advance();
        wait_for_values(last, tile);
        tile = next;
        device::mbarrier_wait(&barriers.key_full[position.stage], position.parity);
        device::wgmma_fence(both, sums, weights);
        Tiles::template multiply_keys<T>(both, group, position.stage);
        multiply_values(last.stage);
        device::wgmma_wait<1>(both);
        leave(&barriers.key_empty[position.stage]);
        weigh(tile, rescale);
        device::hold_registers(both);
        device::compute_before_wait(softmax.row_sum[0] + softmax.row_sum[1] + fabsf(mean[0]) + fabsf(mean[1]));
        device::wgmma_wait<0>(sums, weights);
        leave(&barriers.value_empty[last.stage]);
#pragma unroll
        for (int one = 0; one < 2; ++one) {
#pragma unroll
          for (int columns = 0; columns < kDim / 8; ++columns) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[one][0][columns][e] *= rescale[e / 2];
          }
        }
        Tiles::template pack_weights<T>(weights, both);
      }
      leave(&barriers.owned_empty);
      wait_for_values(position, tile);
      device::wgmma_fence(sums, weights);
      multiply_values(position.stage);
      device::wgmma_wait<0>(sums, weights);
      leave(&barriers.value_empty[position.stage]);
      position.advance();
    }

    softmax.finalize();
    const float inverse[1][2] = {{softmax.inverse(0), softmax.inverse(1)}};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      mean[half] = inverse[0][half] * team_sum(mean[half], 4);
      const int down = half * 8 + lane_row();
      if (down < warp_rows && lane_column() == 0) {
        *row_pointer(p.lse, block.batch, block.head, row + down) = softmax.lse(half);
        *row_pointer(p.tangent_lse, block.batch, block.head, row + down) = mean[half];
      }
    }
#pragma unroll
    for (int columns = 0; columns < kDim / 8; ++columns) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[1][0][columns][e] -= mean[e / 2] * sums[0][0][columns][e];
    }
    store_rows(row_pointer<T>(p.out, block.batch, block.head, row), p.out.row, warp_rows, problem.value_dim, inverse,
               sums[0]);
    store_rows(row_pointer<T>(p.tangent_out, block.batch, block.head, row), p.tangent_out.row, warp_rows,
               problem.value_dim, inverse, sums[1]);
  }
}

// kPadded: with a boolean mask of keys.
template <typename T, int kDim, bool kPadded>
__global__ void __launch_bounds__(kThreads, 1)
    attention_forward_tangent_sm90(const __grid_constant__ TangentMaps maps,
                                   const __grid_constant__ ForwardTangentParams p,
                                   const __grid_constant__ Schedule schedule) {
  BackwardBarriers& barriers = device::shared_variable<BackwardBarriers>();
  if (threadIdx.x == 0) initialize(barriers, forward_tangent_shape(kPadded), false);
  device::sync_block();
  constexpr Registers kRegisters = kPadded ? kPaddedRegisters : kPlainRegisters;
  if (threadIdx.x < kGroupThreads) {
    device::decrease_registers<kRegisters.producer>();
    if (threadIdx.x < (kPadded ? 32 : 1)) {
      produce_with_tangents<T, TilesOfForwardTangent<kDim, kPadded>, kPadded>(maps, p.problem, schedule, barriers);
    }
  } else {
    device::increase_registers<kRegisters.consumer>();
    compute_with_tangent<T, kDim, kPadded>(p, schedule, barriers);
  }
}

}  // namespace fastgen::attention::sm90
