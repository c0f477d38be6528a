// dQ for sm_90a, and delta = rowsum(dO * O) - dlse, which backward_key_value.cuh reads: the mathematics of
// ../backward.cuh with products of warpgroups and tiles copied by the tensor memory accelerator.
//
//   producer, one thread       consumers, one warpgroup for 64 queries each; for each query tile of the block
//   for each query tile          delta
//     copy Q, dO                 S_0 = Q K_0^T
//     for each key tile j        for each key tile j
//       copy K_j, V_j              dP_j = dO V_j^T
//                                  P_j from S_j                      beside dP_j
//                                  dS_j = P_j (dP_j - delta)
//                                  S_j+1 = Q K_j+1^T,  dQ += dS_j K_j                                in flight together
//                                dQ *= scale
//
// While one consumer computes P and dS, the other's products run. Key tiles that the window or the padding excludes for
// the whole query tile are neither copied nor computed. gridDim = blocks of a persistent grid.
#pragma once

#include "attention/backward.cuh"
#include "attention/sm90/backward_pipeline.cuh"
#include "attention/sm90/backward_work.cuh"
#include "device/barrier.cuh"
#include "device/registers.cuh"

namespace fastgen::attention::sm90 {

// The copies of all tiles of the block, by one thread; with padding its whole warp finds them.
template <typename T, int kDim, bool kPadded>
__device__ __forceinline__ void produce_keys(const BackwardMaps& maps, const Problem& problem,
                                             const BackwardSchedule& schedule, BackwardBarriers& barriers) {
  using Tiles = BackwardTiles<kDim, false>;
  using Owned = QueryWork<T, kPadded, Tiles::kOwned, Tiles::kIterated>;
  Position<Tiles::kKeyStages> key_at;
  Position<Tiles::kValueStages> value_at;
  int parity = 0;  // of the query tile
  for (int i = static_cast<int>(blockIdx.x); i < schedule.tiles; i += static_cast<int>(gridDim.x)) {
    const Owned work(problem, schedule, i);
    LiveKeys<kPadded> tile = work.first(problem);
    if (!work.contains(tile)) continue;
    if (threadIdx.x == 0) {
      device::mbarrier_wait(&barriers.owned_empty, parity ^ 1);
      device::mbarrier_arrive_expect(&barriers.owned_full, 2 * Tiles::kOwnedBytes);
      const int row = work.queries.begin;
      Tiles::copy(Tiles::owned_key_dim(), maps.query, Tiles::kOwned, row, work.head, work.batch, &barriers.owned_full);
      Tiles::copy(Tiles::owned_value_dim(), maps.grad_out, Tiles::kOwned, row, work.head, work.batch,
                  &barriers.owned_full);
    }
    parity ^= 1;
    for (; work.contains(tile); tile = work.next(problem, tile), key_at.advance(), value_at.advance()) {
      if (threadIdx.x != 0) continue;
      const int row = work.key(tile);
      device::Mbarrier* full = &barriers.key_full[key_at.stage];
      device::mbarrier_wait(&barriers.key_empty[key_at.stage], key_at.parity ^ 1);
      device::mbarrier_arrive_expect(full, Tiles::kIteratedBytes);
      Tiles::copy(Tiles::key_dim(key_at.stage), maps.key, Tiles::kIterated, row, work.key_head(schedule), work.batch,
                  full);
      full = &barriers.value_full[value_at.stage];
      device::mbarrier_wait(&barriers.value_empty[value_at.stage], value_at.parity ^ 1);
      device::mbarrier_arrive_expect(full, Tiles::kIteratedBytes);
      Tiles::copy(Tiles::value_dim(value_at.stage), maps.value, Tiles::kIterated, row, work.key_head(schedule),
                  work.batch, full);
    }
  }
}

// Keys that no query of the block attends to become zeros: 0 * inf and 0 * NaN are not 0. Called by all consumers.
// (Rows past the end of the tensor are zeros already.)
template <typename Tiles, typename Owned>
__device__ __forceinline__ void clear_unused_keys(unsigned char* keys, const Owned& work,
                                                  const typename Owned::Tile& tile) {
  constexpr int kConsumerThreads = kConsumers * kGroupThreads, kBarrier = 1;
  constexpr int kChunks = kPanelRowBytes / device::kVectorBytes;
  const int first = static_cast<int>(threadIdx.x) - kGroupThreads;
#pragma unroll 1
  for (int chunk = first; chunk < Tiles::kIterated * kChunks; chunk += kConsumerThreads) {
    if (work.is_live(tile, chunk / kChunks)) continue;
#pragma unroll
    for (int panel = 0; panel < Tiles::kPanels; ++panel) {
      constexpr uint32_t kZeros[4] = {};
      unsigned char* at = keys + panel * panel_bytes(Tiles::kIterated) + chunk * device::kVectorBytes;
      device::store_vector(reinterpret_cast<uint32_t*>(at), kZeros);
    }
  }
  device::fence_async_proxy();
  device::sync_named(kBarrier, kConsumerThreads);
}

// scores = score where the key's column is in ``band`` and live, else -inf.
template <int kTiles, typename Owned>
__device__ __forceinline__ void hide_keys(float (&scores)[kTiles][4], const Band& band, const Owned& work,
                                          const typename Owned::Tile& tile) {
  const int begin = work.keys.begin - work.key(tile), end = work.keys.end - work.key(tile);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane_row() + 8 * half;
    const int low = larger(band.low + row, begin) - lane_column();
    const int high = smaller(band.high + row, end - 1) - lane_column();
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = scores[n][2 * half + i];
        bool seen = 8 * n + i >= low && 8 * n + i <= high;
        if constexpr (sizeof(tile) > sizeof(LiveKeys<false>)) {
          const auto live = static_cast<uint32_t>(tile.live[n / 8] >> (n % 8 / 4 * 32)) >> lane_column();
          seen = seen && (live >> (8 * (n % 4) + i) & 1) != 0;
        }
        score = seen ? score : -INFINITY;
      }
    }
  }
}

template <typename T, int kDim, bool kPadded>
__device__ __forceinline__ void compute_grad_query(const BackwardParams& p, const BackwardSchedule& schedule,
                                                   BackwardBarriers& barriers) {
  using Tiles = BackwardTiles<kDim, false>;
  using Owned = QueryWork<T, kPadded, Tiles::kOwned, Tiles::kIterated>;
  constexpr int kTiles = Tiles::kIterated / 8;
  const Problem& problem = p.problem;
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads - 1;
  const int warp_row = group * kGroupRows + static_cast<int>(threadIdx.x % kGroupThreads) / 32 * kFragmentRows;

  float scores[1][kTiles][4], grads[1][kTiles][4];  // S, then P; dP, then dS
  uint32_t weights[Tiles::kDepths][4];              // dS
  float sums[1][kDim / 8][4];                       // dQ
  Position<Tiles::kKeyStages> key_at;
  Position<Tiles::kValueStages> value_at;
  int parity = 0;  // of the query tile

  for (int i = static_cast<int>(blockIdx.x); i < schedule.tiles; i += static_cast<int>(gridDim.x)) {
    const Owned work(problem, schedule, i);
    const int row = work.queries.begin + warp_row, warp_rows = work.queries.end - row;
    const Band window = Band::of<false>(problem, row);
    const RowState state[1] = {row_state<T>(p, work.block(problem), row, warp_rows)};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int down = half * 8 + lane_row();
      if (down < warp_rows && lane_column() == 0)
        *delta_of(p, work.batch, work.head, row + down) = state[0].delta[half];
    }
#pragma unroll
    for (int columns = 0; columns < kDim / 8; ++columns) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[0][columns][e] = 0.0f;
    }

    const auto wait_for_keys = [&](const LiveKeys<kPadded>& tile) {
      device::mbarrier_wait(&barriers.key_full[key_at.stage], key_at.parity);
      if (!work.is_whole(tile)) clear_unused_keys<Tiles>(Tiles::key_dim(key_at.stage), work, tile);
    };
    LiveKeys<kPadded> tile = work.first(problem);
    if (work.contains(tile)) {
      device::mbarrier_wait(&barriers.owned_full, parity);
      parity ^= 1;
      wait_for_keys(tile);
      device::wgmma_fence(scores[0], sums[0]);
      Tiles::template multiply_rows<T>(scores[0], Tiles::owned_key_dim(), Tiles::key_dim(key_at.stage), group);
      for (bool first = true;; first = false) {
        device::wgmma_wait<0>(scores[0], sums[0], weights);
        if (!first) leave(&barriers.key_empty[key_at.last_stage()]);
        const Band band = window.from(work.key(tile));
        const bool masked = !work.is_whole(tile) || !band.covers(kFragmentRows, Tiles::kIterated);
        const float factor = positive_factor(scores[0], problem.scale * kLog2e);
        if (masked) hide_keys(scores[0], band, work, tile);
        device::mbarrier_wait(&barriers.value_full[value_at.stage], value_at.parity);
        device::fence_after_wait(grads[0]);
        Tiles::template multiply_rows<T>(grads[0], Tiles::owned_value_dim(), Tiles::value_dim(value_at.stage), group);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) scores[0][n][e] = weight(scores[0][n][e], factor, state[0].shift[e / 2]);
        }
        device::wgmma_wait<0>(grads[0]);
        leave(&barriers.value_empty[value_at.stage]);
        value_at.advance();
        center_gradients<true>(grads, state, problem, 0, 0, 0);
        if (masked) clear_where_zero(grads, scores);
        multiply_scores(grads, scores);
        pack_scores<T>(weights, grads[0]);
        key_at.advance();
        tile = work.next(problem, tile);
        if (!work.contains(tile)) {
          leave(&barriers.owned_empty);
          device::wgmma_fence(sums[0], weights);
          Tiles::template multiply_weights<T>(sums[0], weights, Tiles::key_dim(key_at.last_stage()));
          device::wgmma_wait<0>(sums[0], weights);
          leave(&barriers.key_empty[key_at.last_stage()]);
          break;
        }
        wait_for_keys(tile);
        device::wgmma_fence(scores[0], grads[0], weights);
        Tiles::template multiply_rows<T>(scores[0], Tiles::owned_key_dim(), Tiles::key_dim(key_at.stage), group);
        Tiles::template multiply_weights<T>(sums[0], weights, Tiles::key_dim(key_at.last_stage()));
      }
    }

    const float factors[1][2] = {{problem.scale, problem.scale}};
    store_rows(row_pointer<T>(p.grad_query, work.batch, work.head, row), p.grad_query.row, warp_rows, problem.key_dim,
               factors, sums);
  }
}

// kPadded: with a boolean mask of keys.
template <typename T, int kDim, bool kPadded>
__global__ void __launch_bounds__(kThreads, 1)
    attention_backward_query_sm90(const __grid_constant__ BackwardMaps maps, const __grid_constant__ BackwardParams p,

                                  const __grid_constant__ BackwardSchedule schedule) {
  BackwardBarriers& barriers = device::shared_variable<BackwardBarriers>();
  if (threadIdx.x == 0) initialize(barriers, backward_shape(kDim, false), false);
  device::sync_block();
  constexpr Registers kRegisters = kPadded ? kPaddedRegisters : kPlainRegisters;
  if (threadIdx.x < kGroupThreads) {
    device::decrease_registers<kRegisters.producer>();
    if (threadIdx.x < (kPadded ? 32 : 1)) produce_keys<T, kDim, kPadded>(maps, p.problem, schedule, barriers);
  } else {
    device::increase_registers<kRegisters.consumer>();
    compute_grad_query<T, kDim, kPadded>(p, schedule, barriers);
  }
}

}  // namespace fastgen::attention::sm90
