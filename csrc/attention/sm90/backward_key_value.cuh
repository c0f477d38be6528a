// dK and dV for sm_90a: the mathematics of ../backward.cuh with products of warpgroups and tiles copied by the tensor
// memory accelerator. Scores are transposed: rows are keys, columns are queries, so that P^T and dS^T are left operands
// in registers.
//
//   producer, one warp            consumers, one warpgroup for 64 keys each; for each key tile of the block
//   for each key tile               S_0^T = K Q_0^T
//     copy K, V                     for each query tile i of each head of the group
//     for each query tile i           P_i^T from S_i^T          beside dP and, without padding, dV and dK of the last
//     tile
//       copy Q_i, dO_i                dP_i^T = V dO_i^T
//       lse, delta                    dS_i^T = P_i^T (dP_i^T - delta)
//                                     S_i+1^T = K Q_i+1^T,  dV += P_i^T dO_i,  dK += dS_i^T Q_i     in flight together
//                                   dK *= scale
//
// While one consumer computes P and dS, the other's products run. Sums over queries and heads have one order. Query
// tiles that the window excludes for the whole key tile, and heads whose mask excludes all of its keys, are neither
// copied nor computed. gridDim = blocks of a persistent grid.
#pragma once

#include "attention/backward.cuh"
#include "attention/sm90/backward_pipeline.cuh"
#include "attention/sm90/backward_work.cuh"
#include "device/registers.cuh"

namespace fastgen::attention::sm90 {

// The producer reads logsumexp and delta.
constexpr Registers kKeyValueRegisters = {56, 224};
static_assert(add_up(kKeyValueRegisters), "what consumers gain is what the producer gives up");

// The copies of all tiles of the block, by one warp.
template <typename T, int kDim, bool kPadded>
__device__ __forceinline__ void produce_queries(const BackwardMaps& maps, const BackwardParams& p,
                                                const BackwardSchedule& schedule, BackwardBarriers& barriers) {
  using Tiles = BackwardTiles<kDim, true>;
  using Owned = KeyWork<T, kPadded, Tiles::kOwned, Tiles::kIterated>;
  constexpr int kRows = Tiles::kIterated / 32;  // of a lane
  const Problem& problem = p.problem;
  const int lane = static_cast<int>(threadIdx.x);
  Position<Tiles::kKeyStages> at;  // of both rings
  static_assert(Tiles::kKeyStages == Tiles::kValueStages, "a query and its dO have the same stage");
  int parity = 0;  // of the key tile
  for (int i = static_cast<int>(blockIdx.x); i < schedule.tiles; i += static_cast<int>(gridDim.x)) {
    const Owned work(problem, schedule, i, 0);
    QueryTile<kPadded> tile = work.first(problem, schedule);
    if (!work.contains(schedule, tile)) continue;
    if (lane == 0) {
      device::mbarrier_wait(&barriers.owned_empty, parity ^ 1);
      device::mbarrier_arrive_expect(&barriers.owned_full, 2 * Tiles::kOwnedBytes);
      const int row = work.keys.begin;
      Tiles::copy(Tiles::owned_key_dim(), maps.key, Tiles::kOwned, row, work.key_head, work.batch,
                  &barriers.owned_full);
      Tiles::copy(Tiles::owned_value_dim(), maps.value, Tiles::kOwned, row, work.key_head, work.batch,
                  &barriers.owned_full);
    }
    parity ^= 1;
    for (; work.contains(schedule, tile); tile = work.next(problem, schedule, tile), at.advance()) {
      const unsigned head = work.head(schedule, tile.head);
      const int row = work.query(tile);
      const float* lse = row_pointer(p.lse, work.batch, head, row);
      const float* deltas = delta_of(p, work.batch, head, row);
      float shift[kRows], delta[kRows];
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const int down = 32 * k + lane;
        const bool exists = row + down < problem.queries;
        shift[k] = exists ? weight_shift(kLog2e * lse[down * p.lse.row]) : INFINITY;
        delta[k] = exists ? deltas[down] : 0.0f;
      }
      device::mbarrier_wait(&barriers.key_empty[at.stage], at.parity ^ 1);
      float* values = Tiles::row_values(at.stage);
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        values[32 * k + lane] = shift[k], values[Tiles::kIterated + 32 * k + lane] = delta[k];
      }
      device::sync_warp();
      if (lane != 0) continue;
      device::Mbarrier* full = &barriers.key_full[at.stage];
      device::mbarrier_arrive_expect(full, Tiles::kIteratedBytes);
      Tiles::copy(Tiles::key_dim(at.stage), maps.query, Tiles::kIterated, row, head, work.batch, full);
      full = &barriers.value_full[at.stage];
      device::mbarrier_arrive_expect(full, Tiles::kIteratedBytes);
      Tiles::copy(Tiles::value_dim(at.stage), maps.grad_out, Tiles::kIterated, row, head, work.batch, full);
    }
  }
}

// scores = score where the query's column is in low ... high of the key's row, else -inf. ``live``: bits of the warp's
// 16 keys.
template <int kTiles>
__device__ __forceinline__ void hide_queries(float (&scores)[kTiles][4], const Band& band, int queries, uint32_t live) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane_row() + 8 * half;
    const int low = band.low + row - lane_column();
    const int last = (live >> row & 1) != 0 ? smaller(band.high + row, queries - 1) : -1;
    const int high = last - lane_column();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = scores[tile][2 * half + i];
        score = 8 * tile + i >= low && 8 * tile + i <= high ? score : -INFINITY;
      }
    }
  }
}

template <typename T, int kDim, bool kPadded>
__device__ __forceinline__ void compute_grad_key_value(const BackwardParams& p, const BackwardSchedule& schedule,
                                                       BackwardBarriers& barriers) {
  using Tiles = BackwardTiles<kDim, true>;
  using Owned = KeyWork<T, kPadded, Tiles::kOwned, Tiles::kIterated>;
  constexpr int kTiles = Tiles::kIterated / 8;
  constexpr bool kBeside = !kPadded;  // some of P is computed beside dV and dK; with padding there are no registers
  const Problem& problem = p.problem;
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads - 1;
  const int row_of_group = static_cast<int>(threadIdx.x % kGroupThreads) / 32 * kFragmentRows;
  const int warp_row = group * kGroupRows + row_of_group;

  float scores[1][kTiles][4], grads[1][kTiles][4];                      // S^T, then P^T; dP^T, then dS^T
  uint32_t weights[Tiles::kDepths][4], score_grads[Tiles::kDepths][4];  // P^T, dS^T
  float value_sums[1][kDim / 8][4], key_sums[1][kDim / 8][4];           // dV, dK
  Position<Tiles::kKeyStages> at;                                       // of both rings
  static_assert(Tiles::kKeyStages == Tiles::kValueStages, "a query and its dO have the same stage");
  int parity = 0;  // of the key tile
  const auto multiply_values = [&] {
    device::mbarrier_wait(&barriers.value_full[at.stage], at.parity);
    device::fence_after_wait(grads[0]);
    Tiles::template multiply_rows<T>(grads[0], Tiles::owned_value_dim(), Tiles::value_dim(at.stage), group);
  };
  const auto leave_stage = [&](int stage) {
    device::sync_warp();  // all lanes have read the row values
    leave(&barriers.key_empty[stage]);
  };

  for (int i = static_cast<int>(blockIdx.x); i < schedule.tiles; i += static_cast<int>(gridDim.x)) {
    const Owned work(problem, schedule, i, warp_row);
    const int key = work.keys.begin + warp_row, warp_rows = work.keys.end - key;
    const Band window = Band::of<true>(problem, key);
#pragma unroll
    for (int columns = 0; columns < kDim / 8; ++columns) {
#pragma unroll
      for (int e = 0; e < 4; ++e) value_sums[0][columns][e] = key_sums[0][columns][e] = 0.0f;
    }

    QueryTile<kPadded> tile = work.first(problem, schedule);
    if (work.contains(schedule, tile)) {
      device::mbarrier_wait(&barriers.owned_full, parity);
      parity ^= 1;
      device::mbarrier_wait(&barriers.key_full[at.stage], at.parity);
      device::wgmma_fence(scores[0], key_sums[0], value_sums[0]);
      Tiles::template multiply_rows<T>(scores[0], Tiles::owned_key_dim(), Tiles::key_dim(at.stage), group);
      if constexpr (kBeside) {
        device::wgmma_commit();  // in the place of dV of an earlier tile
        device::wgmma_commit();  // in the place of dK
      }
      for (bool first = true;; first = false) {
        if constexpr (kBeside) {
          device::wgmma_wait<2>(scores[0]);
        } else {
          device::wgmma_wait<0>(scores[0], weights, score_grads);
          if (!first) leave_stage(at.last_stage());
        }
        const int query = work.query(tile), queries = problem.queries - query;
        const Band band = window.from(query);
        uint32_t live = 0xffffu;
        if constexpr (kPadded) live = tile.live;
        const bool masked =
            queries < Tiles::kIterated || !band.covers(kFragmentRows, Tiles::kIterated) || live != 0xffffu;
        const float factor = positive_factor(scores[0], problem.scale * kLog2e);
        if (masked) hide_queries(scores[0], band, queries, live);
        if constexpr (!kBeside) multiply_values();
        float some = 0.0f;  // of the weights
        const float* values = Tiles::row_values(at.stage) + lane_column();
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          uint32_t shift[2];
          device::load_words(values + 8 * n, shift);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            scores[0][n][e] = weight(scores[0][n][e], factor, bits_to_float(shift[e % 2]));
          }
          some += scores[0][n][3];
        }
        if constexpr (kBeside) {
          device::hold_registers(scores[0]);
          device::compute_before_wait(some * factor);
          device::wgmma_wait<0>(weights, score_grads);
          if (!first) leave_stage(at.last_stage());
          multiply_values();
        }
        device::wgmma_wait<0>(grads[0]);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          uint32_t delta[2];
          device::load_words(values + Tiles::kIterated + 8 * n, delta);
#pragma unroll
          for (int e = 0; e < 4; ++e) grads[0][n][e] -= bits_to_float(delta[e % 2]);
        }
        if (masked) clear_where_zero(grads, scores);
        multiply_scores(grads, scores);
        pack_scores<T>(weights, scores[0]);
        pack_scores<T>(score_grads, grads[0]);
        at.advance();
        tile = work.next(problem, schedule, tile);
        if (!work.contains(schedule, tile)) {
          leave(&barriers.owned_empty);
          device::wgmma_fence(weights, score_grads);
          Tiles::template multiply_weights<T>(value_sums[0], weights, Tiles::value_dim(at.last_stage()));
          Tiles::template multiply_weights<T>(key_sums[0], score_grads, Tiles::key_dim(at.last_stage()));
          device::wgmma_wait<0>(value_sums[0], key_sums[0]);
          leave_stage(at.last_stage());
          break;
        }
        device::mbarrier_wait(&barriers.key_full[at.stage], at.parity);
        device::wgmma_fence(scores[0], weights, score_grads);
        Tiles::template multiply_rows<T>(scores[0], Tiles::owned_key_dim(), Tiles::key_dim(at.stage), group);
        Tiles::template multiply_weights<T>(value_sums[0], weights, Tiles::value_dim(at.last_stage()));
        Tiles::template multiply_weights<T>(key_sums[0], score_grads, Tiles::key_dim(at.last_stage()));
      }
    }

    const float factors[1][2] = {{problem.scale, problem.scale}}, ones[1][2] = {{1.0f, 1.0f}};
    store_rows(row_pointer<T>(p.grad_value, work.batch, work.key_head, key), p.grad_value.row, warp_rows,
               problem.value_dim, ones, value_sums);
    store_rows(row_pointer<T>(p.grad_key, work.batch, work.key_head, key), p.grad_key.row, warp_rows, problem.key_dim,
               factors, key_sums);
  }
}

// kPadded: with a boolean mask of keys.
template <typename T, int kDim, bool kPadded>
__global__ void __launch_bounds__(kThreads, 1)
    attention_backward_key_value_sm90(const __grid_constant__ BackwardMaps maps,
                                      const __grid_constant__ BackwardParams p,
                                      const __grid_constant__ BackwardSchedule schedule) {
  BackwardBarriers& barriers = device::shared_variable<BackwardBarriers>();
  if (threadIdx.x == 0) initialize(barriers, backward_shape(kDim, true), true);
  device::sync_block();
  if (threadIdx.x < kGroupThreads) {
    device::decrease_registers<kKeyValueRegisters.producer>();
    if (threadIdx.x < 32) produce_queries<T, kDim, kPadded>(maps, p, schedule, barriers);
  } else {
    device::increase_registers<kKeyValueRegisters.consumer>();
    compute_grad_key_value<T, kDim, kPadded>(p, schedule, barriers);
  }
}

}  // namespace fastgen::attention::sm90
