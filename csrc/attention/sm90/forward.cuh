// Forward pass for sm_90a (Shah, Bikshandi, Zhang, Thakkar, Ramani, Dao, "FlashAttention-3", 2024): the mathematics of
// ../forward.cuh with products of warpgroups and tiles copied by the tensor memory accelerator.
//
//   producer, one thread      consumers, one warpgroup for 64 queries each; for each query tile of the block
//   for each query tile         S_0 = Q K_0^T                        softmax: P_0
//     copy Q                    for each further key tile i
//     for each key tile i         S_i = Q K_i^T   O += P_i-1 V_i-1   both in flight; softmax of S_i beside the second
//       copy K_i, V_i             O *= 2^(m - m'), P_i
//                               O += P_n V_n                         out = O / l, lse = m + log l
//
// The consumers take turns at starting products: the softmax of one runs beside the products of the other.
//
// Key tiles that the window or the padding excludes for the whole query tile are neither copied nor computed. gridDim =
// blocks of a persistent grid.
#pragma once

#include "attention/scheduler.cuh"
#include "attention/sm90/maps.cuh"
#include "attention/sm90/pipeline.cuh"
#include "attention/softmax.cuh"
#include "attention/store.cuh"
#include "device/barrier.cuh"
#include "device/registers.cuh"
#include "device/vector.cuh"
#include "device/wgmma.cuh"

namespace fastgen::attention::sm90 {

struct Schedule {
  int64_t tiles = 0;      // of queries, of all heads
  int heads_in_turn = 1;  // plan.h
};

// A tile of keys. With padding, one bit for each that is in the range and that the mask does not exclude.
template <bool kPadded, int kKeys = BLOCK_N>
struct KeyTile {
  int index;

  __device__ __forceinline__ int key() const { return index * kKeys; }
};
template <int kKeys>
struct KeyTile<true, kKeys> : KeyTile<false, kKeys> {
  static constexpr int kWords = (kKeys + 63) / 64;
  static_assert(kWords <= 2, "is_live and find read two words at most");
  uint64_t live[kWords];
};

// A query tile and its keys. kPadded: with a boolean mask of keys. Then the functions are called by whole warps.
template <typename T, bool kPadded, int kRows = BLOCK_M, int kKeys = BLOCK_N>
struct Work {
  using Tile = KeyTile<kPadded, kKeys>;
  QueryBlock block;
  Range keys;
  HeadMask<T> mask;
  int first_tile, end_tile;

  __device__ __forceinline__ Work(const Problem& p, const Schedule& schedule, int64_t i)
      : block(p, in_turn(p, schedule, i), kRows, MayPack<false>()),
        keys(keys_in_window(p, block.queries, p.keys)),
        mask(p.mask, block.batch, block.head),
        first_tile(keys.begin / kKeys),
        end_tile(keys.empty() ? first_tile : (keys.end + kKeys - 1) / kKeys) {}
  __device__ __forceinline__ Tile first() const { return find(first_tile); }
  __device__ __forceinline__ Tile next(const Tile& tile) const { return find(tile.index + 1); }
  __device__ __forceinline__ bool contains(const Tile& tile) const { return tile.index < end_tile; }

  // Whether a key is one that a query of the block may attend to, and whether all of a tile are.
  __device__ __forceinline__ bool is_live(const Tile& tile, int row) const {
    if constexpr (kPadded) {
      // An index that is not a constant would put them into local memory.
      const uint64_t word = row < 64 ? tile.live[0] : tile.live[Tile::kWords - 1];
      return (word >> (row % 64) & 1) != 0;
    } else {
      return tile.key() + row >= keys.begin && tile.key() + row < keys.end;
    }
  }
  __device__ __forceinline__ bool is_whole(const Tile& tile) const {
    if constexpr (kPadded) {
      constexpr int kOfLast = kKeys - 64 * (Tile::kWords - 1);
      return tile.live[0] == full<64>() && tile.live[Tile::kWords - 1] == full<kOfLast>();
    } else {
      return tile.key() >= keys.begin && tile.key() + kKeys <= keys.end;
    }
  }

 private:
  // The first tile from ``index`` on with a live key.
  __device__ __forceinline__ Tile find(int index) const {
    if constexpr (kPadded) {
      Tile tile = {{index}, {}};
      for (; tile.index < end_tile; ++tile.index) {
#pragma unroll
        for (int word = 0; word < Tile::kWords; ++word) {
          const Range inside = {keys.begin, smaller(keys.end, tile.key() + kKeys)};
          tile.live[word] = mask.template live<64, false>(inside, tile.key() + 64 * word);
        }
        if ((tile.live[0] | tile.live[Tile::kWords - 1]) != 0) break;
      }
      return tile;
    } else {
      return {index};
    }
  }
  // The i-th tile as a QueryBlock's index: of each group of heads first the last tile of each head, which has most keys
  // under a causal mask, then the last but one.
  static __device__ __forceinline__ int64_t in_turn(const Problem& p, const Schedule& schedule, int64_t i) {
    const int of_head = (p.queries + kRows - 1) / kRows, all = p.batch * p.heads;
    const int64_t of_group = static_cast<int64_t>(of_head) * schedule.heads_in_turn;
    const int group = static_cast<int>(i / of_group), first_head = group * schedule.heads_in_turn;
    const int heads = smaller(schedule.heads_in_turn, all - first_head), at = static_cast<int>(i - group * of_group);
    return static_cast<int64_t>(first_head + at % heads) * of_head + at / heads;
  }
};

template <int kDim, int kConsumerCount, int kKeyCount>
struct ForwardTiles {
  static constexpr int kRows = kConsumerCount * kGroupRows, kKeys = kKeyCount;
  static constexpr int kQueryBuffers = forward_query_buffers(kDim), kStages = stages(kDim), kPanels = kDim / kPanelDim;
  static constexpr int kQueryBytes = tile_bytes(kRows, kDim), kKeyBytes = tile_bytes(kKeys, kDim);
  // The output: parts of as many columns as one product has.
  static constexpr int kPartDim = kDim % 128 == 0 ? 128 : 64, kParts = kDim / kPartDim;

  static __device__ __forceinline__ unsigned char* query(int buffer) {
    return device::dynamic_shared() + buffer * kQueryBytes;
  }
  static __device__ __forceinline__ unsigned char* key(int stage) { return query(kQueryBuffers) + stage * kKeyBytes; }
  static __device__ __forceinline__ unsigned char* value(int stage) { return key(kStages + stage); }
};

// The copies of all tiles of the block, by one thread; with padding its whole warp finds them.
template <typename T, int kDim, int kConsumerCount, int kKeyCount, bool kPadded>
__device__ __forceinline__ void produce(const ForwardMaps& maps, const Problem& problem, const Schedule& schedule,
                                        Barriers& barriers) {
  using Tiles = ForwardTiles<kDim, kConsumerCount, kKeyCount>;
  using ForwardWork = Work<T, kPadded, Tiles::kRows, Tiles::kKeys>;
  const auto copy = [](unsigned char* tile, const device::TensorMap& map, int rows, int row, unsigned head,
                       unsigned batch, device::Mbarrier* full) {
#pragma unroll
    for (int panel = 0; panel < Tiles::kPanels; ++panel) {
      const int at[] = {panel * kPanelDim, row, static_cast<int>(head), static_cast<int>(batch)};
      device::tensor_load(tile + panel * panel_bytes(rows), map, at, full);
    }
  };
  Position<Tiles::kQueryBuffers> query;
  Position<Tiles::kStages> position;
  for (int64_t i = blockIdx.x; i < schedule.tiles; i += gridDim.x) {
    const ForwardWork work(problem, schedule, i);
    const QueryBlock& block = work.block;
    typename ForwardWork::Tile tile = work.first();
    if (!work.contains(tile)) continue;
    if (threadIdx.x == 0) {
      device::Mbarrier* full = &barriers.query_full[query.stage];
      device::mbarrier_wait(&barriers.query_empty[query.stage], query.parity ^ 1);
      device::mbarrier_arrive_expect(full, Tiles::kQueryBytes);
      copy(Tiles::query(query.stage), maps.query, Tiles::kRows, block.queries.begin, block.head, block.batch, full);
    }
    query.advance();
    for (; work.contains(tile); tile = work.next(tile), position.advance()) {
      if (threadIdx.x != 0) continue;
      const int stage = position.stage, row = tile.key();
      device::mbarrier_wait(&barriers.key_empty[stage], position.parity ^ 1);
      device::mbarrier_arrive_expect(&barriers.key_full[stage], Tiles::kKeyBytes);
      copy(Tiles::key(stage), maps.key, Tiles::kKeys, row, block.key_head, block.key_batch, &barriers.key_full[stage]);
      device::mbarrier_wait(&barriers.value_empty[stage], position.parity ^ 1);
      device::mbarrier_arrive_expect(&barriers.value_full[stage], Tiles::kKeyBytes);
      copy(Tiles::value(stage), maps.value, Tiles::kKeys, row, block.key_head, block.key_batch,
           &barriers.value_full[stage]);
    }
  }
}

// Named barriers; 0 is sync_block's.
constexpr int kTurnBarrier = 1;                  // and the next, one for each consumer
constexpr int kTurnThreads = 2 * kGroupThreads;  // of the one that takes its turn and of the one that passes it on
constexpr int kClearBarrier = kTurnBarrier + 3;  // of all consumers

// Values that no query of the block attends to become zeros: 0 * inf and 0 * NaN are not 0. Called by all consumers.
// (Rows past the end of the tensor are zeros already.)
template <int kDim, typename T, bool kPadded, int kRows, int kKeys>
__device__ __forceinline__ void clear_unused_values(unsigned char* values, const Work<T, kPadded, kRows, kKeys>& work,
                                                    const KeyTile<kPadded, kKeys>& tile) {
  constexpr int kConsumerThreads = kRows / kGroupRows * kGroupThreads;
  const int chunks = kPanelRowBytes / device::kVectorBytes;
  const int first = static_cast<int>(threadIdx.x) - kGroupThreads;
  for (int chunk = first; chunk < kKeys * chunks; chunk += kConsumerThreads) {
    if (work.is_live(tile, chunk / chunks)) continue;
#pragma unroll
    for (int panel = 0; panel < kDim / kPanelDim; ++panel) {
      constexpr uint32_t kZeros[4] = {};
      device::store_vector(
          reinterpret_cast<uint32_t*>(values + panel * panel_bytes(kKeys) + chunk * device::kVectorBytes), kZeros);
    }
  }
  device::fence_async_proxy();
  device::sync_named(kClearBarrier, kConsumerThreads);
}

// Masks the products q.k of a warp's 16 rows and the keys of a tile, where ``masked`` says that this has to be done.
// Returns the factor, which is positive, by which the results have to be multiplied to be scores in units of log2.
template <int kTiles, typename T, bool kPadded, int kRows, int kKeys>
__device__ __forceinline__ float mask_scores(float (&scores)[kTiles][4], float scale, bool masked, const Band& band,
                                             const Work<T, kPadded, kRows, kKeys>& work,
                                             const KeyTile<kPadded, kKeys>& key_tile) {
  if (!(scale > 0.0f)) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[tile][i] *= scale;
    }
    scale = 1.0f;
  }
  if (masked) {
    constexpr int kWords = (kKeys + 31) / 32;
    uint32_t live[kWords] = {};  // from this lane's first column on
    if constexpr (kPadded) {
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        live[word] = static_cast<uint32_t>(key_tile.live[word / 2] >> (word % 2 * 32)) >> lane_column();
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane_row() + 8 * half;
      const int low = larger(band.low + row, work.keys.begin - key_tile.key()) - lane_column();
      const int high = smaller(band.high + row, work.keys.end - 1 - key_tile.key()) - lane_column();
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = 8 * tile + i;
          float& score = scores[tile][2 * half + i];
          const bool hidden = kPadded && (live[tile / 4] >> (8 * (tile % 4) + i) & 1) == 0;
          score = column >= low && column <= high && !hidden ? score : -INFINITY;
        }
      }
    }
  }
  return scale;
}

template <typename T, int kDim, int kConsumerCount, int kKeyCount, bool kPadded>
__device__ __forceinline__ void consume(const ForwardParams& p, const Schedule& schedule, Barriers& barriers) {
  using Tiles = ForwardTiles<kDim, kConsumerCount, kKeyCount>;
  using ForwardWork = Work<T, kPadded, Tiles::kRows, Tiles::kKeys>;
  using device::MatrixTile;
  using device::Rows;
  using Tile = typename ForwardWork::Tile;
  constexpr int kRows = Tiles::kRows, kKeys = Tiles::kKeys;
  constexpr int kTiles = kKeys / 8, kDepths = kKeys / device::kWgmmaDepth;
  const Problem& problem = p.problem;
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads - 1;
  const int warp_row = group * kGroupRows + static_cast<int>(threadIdx.x % kGroupThreads) / 32 * kFragmentRows;

  float scores[kTiles][4];       // of the newest key tile
  uint32_t weights[kDepths][4];  // P of the one before
  float out[Tiles::kParts][1][Tiles::kPartDim / 8][4];
  Position<Tiles::kQueryBuffers> queries;
  Position<Tiles::kStages> position;  // of the newest key tile

  const auto multiply_keys = [&](int stage) {
    unsigned char* rows = Tiles::query(queries.stage) + group * panel_bytes(kGroupRows);
    const auto query = device::matrix_tile<Rows::kOuter>(rows);
    const auto key = device::matrix_tile<Rows::kOuter>(Tiles::key(stage));
#pragma unroll
    for (int k = 0; k < kDim; k += device::kWgmmaDepth) {
      const int panel = k / kPanelDim, across = k % kPanelDim * static_cast<int>(sizeof(T));
      device::wgmma<T>(scores, query.from(panel * panel_bytes(kRows) + across),
                       key.from(panel * panel_bytes(kKeys) + across), k > 0);
    }
    device::wgmma_commit();
  };
  const auto multiply_values = [&](int stage) {
    const auto value = device::matrix_tile<Rows::kDepth>(Tiles::value(stage), panel_bytes(kKeys));
#pragma unroll
    for (int k = 0; k < kDepths; ++k) {
#pragma unroll
      for (int part = 0; part < Tiles::kParts; ++part) {
        const int panel = part * Tiles::kPartDim / kPanelDim;
        device::wgmma<T>(out[part][0], weights[k],
                         value.from(panel * panel_bytes(kKeys) + k * device::kWgmmaDepth * kPanelRowBytes));
      }
    }
    device::wgmma_commit();
  };
  const auto take_turn = [&] { device::sync_named(kTurnBarrier + group, kTurnThreads); };
  const auto pass_turn = [&] { device::arrive_named(kTurnBarrier + (group + 1) % kConsumerCount, kTurnThreads); };
  if (group == kConsumerCount - 1) pass_turn();

  for (int64_t i = blockIdx.x; i < schedule.tiles; i += gridDim.x) {
    const ForwardWork work(problem, schedule, i);
    const QueryBlock& block = work.block;
    const int row = block.queries.begin + warp_row, warp_rows = block.rows() - warp_row;
    const Band window = Band::of<false>(problem, row);
    Softmax softmax;
#pragma unroll
    for (int part = 0; part < Tiles::kParts; ++part) {
#pragma unroll
      for (int columns = 0; columns < Tiles::kPartDim / 8; ++columns) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[part][0][columns][e] = 0.0f;
      }
    }

    // The weights of the scores of a key tile, and the factors for earlier sums.
    const auto apply_softmax = [&](const Tile& tile, float (&rescale)[2]) {
      const Band band = window.from(tile.key());
      const bool masked = !work.is_whole(tile) || !band.covers(kFragmentRows, kKeys);
      const float factor = mask_scores(scores, problem.scale * kLog2e, masked, band, work, tile);
      softmax.update(scores, factor, rescale);
    };
    const auto pack_weights = [&] {
#pragma unroll
      for (int k = 0; k < kDepths; ++k) Product<T>::from_scores(weights[k], scores + 2 * k);
    };
    const auto wait_for_values = [&](const Position<Tiles::kStages>& at, const Tile& tile) {
      device::mbarrier_wait(&barriers.value_full[at.stage], at.parity);
      if (!work.is_whole(tile)) clear_unused_values<kDim>(Tiles::value(at.stage), work, tile);
    };

    typename ForwardWork::Tile tile = work.first();
    if (work.contains(tile)) {
      device::mbarrier_wait(&barriers.query_full[queries.stage], queries.parity);
      device::mbarrier_wait(&barriers.key_full[position.stage], position.parity);
      take_turn();
      device::wgmma_fence(scores);
      multiply_keys(position.stage);
      pass_turn();
      device::wgmma_wait<0>(scores);
      leave(&barriers.key_empty[position.stage]);
      float rescale[2];
      apply_softmax(tile, rescale);
      pack_weights();

      for (Tile next = work.next(tile); work.contains(next); next = work.next(tile)) {
        const Position<Tiles::kStages> last = position;
        position.advance();
        wait_for_values(last, tile);
        tile = next;
        device::mbarrier_wait(&barriers.key_full[position.stage], position.parity);
        take_turn();
        device::wgmma_fence(scores, out, weights);
        multiply_keys(position.stage);
        multiply_values(last.stage);
        pass_turn();
        device::wgmma_wait<1>(scores);
        leave(&barriers.key_empty[position.stage]);
        apply_softmax(tile, rescale);
        device::hold_registers(scores);
        device::compute_before_wait(softmax.row_sum[0] + softmax.row_sum[1]);
        device::wgmma_wait<0>(out, weights);
        leave(&barriers.value_empty[last.stage]);
#pragma unroll
        for (int part = 0; part < Tiles::kParts; ++part) {
#pragma unroll
          for (int columns = 0; columns < Tiles::kPartDim / 8; ++columns) {
#pragma unroll
            for (int e = 0; e < 4; ++e) out[part][0][columns][e] *= rescale[e / 2];
          }
        }
        pack_weights();
      }
      leave(&barriers.query_empty[queries.stage]);
      queries.advance();
      wait_for_values(position, tile);
      device::wgmma_fence(out, weights);
      multiply_values(position.stage);
      device::wgmma_wait<0>(out, weights);
      leave(&barriers.value_empty[position.stage]);
      position.advance();
    }

    softmax.finalize();
    const float inverse[1][2] = {{softmax.inverse(0), softmax.inverse(1)}};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int down = half * 8 + lane_row();
      if (down < warp_rows && lane_column() == 0) {
        *row_pointer(p.lse, block.batch, block.head, row + down) = softmax.lse(half);
      }
    }
#pragma unroll
    for (int part = 0; part < Tiles::kParts; ++part) {
      const int column = part * Tiles::kPartDim;
      store_rows(row_pointer<T>(p.out, block.batch, block.head, row) + column, p.out.row, warp_rows,
                 problem.value_dim - column, inverse, out[part]);
    }
  }
}

// kPadded: with a boolean mask of keys.
template <typename T, int kDim, int kConsumerCount, int kKeyCount, bool kPadded>
__global__ void __launch_bounds__((1 + kConsumerCount) * kGroupThreads, 1)
    attention_forward_sm90(const __grid_constant__ ForwardMaps maps, const __grid_constant__ ForwardParams p,
                           Schedule schedule) {
  Barriers& barriers = device::shared_variable<Barriers>();
  if (threadIdx.x == 0) {
    using Tiles = ForwardTiles<kDim, kConsumerCount, kKeyCount>;
    initialize(barriers, Tiles::kQueryBuffers, Tiles::kStages, kConsumerCount * kGroupThreads / 32);
  }
  device::sync_block();
  constexpr Registers kRegisters = registers_of(kConsumerCount, kPadded);
  if (threadIdx.x < kGroupThreads) {
    device::decrease_registers<kRegisters.producer>();
    if (threadIdx.x < (kPadded ? 32 : 1)) {
      produce<T, kDim, kConsumerCount, kKeyCount, kPadded>(maps, p.problem, schedule, barriers);
    }
  } else {
    device::increase_registers<kRegisters.consumer>();
    consume<T, kDim, kConsumerCount, kKeyCount, kPadded>(p, schedule, barriers);
  }
}

}  // namespace fastgen::attention::sm90
