// Shared memory of the backward pass: owned tiles, and two rings of iterated tiles.
//
//   kOwnsKeys   owned_key_dim  owned_value_dim   key_dim(i)  value_dim(i)  row_values(i)
//   false       Q              dO                K           V
//   true        K              V                 Q           dO            logsumexp, delta
//
// full completes when the bytes of a tile, and the row values beside it, have arrived; empty when every warp of the
// consumers has left it. K is needed for longer than V, for another product: each has a ring. Q and dO of a tile are
// left together: key_empty is that of both.
#pragma once

#include "attention/sm90/backward_plan.h"
#include "attention/sm90/maps.cuh"
#include "attention/sm90/pipeline.cuh"
#include "common/tile.cuh"
#include "device/shared.cuh"
#include "device/wgmma.cuh"

namespace fastgen::attention::sm90 {

struct BackwardMaps {
  device::TensorMap query, key, value, grad_out;
};

struct BackwardBarriers {
  device::Mbarrier owned_full, owned_empty;
  device::Mbarrier key_full[kMostStages], key_empty[kMostStages], value_full[kMostStages], value_empty[kMostStages];
};
static_assert(sizeof(BackwardBarriers) <= kMbarrierBytes, "the barriers have their place in static shared memory");

// By one thread; the block has to synchronize after it.
__device__ __forceinline__ void initialize(BackwardBarriers& barriers, const BackwardShape& shape, bool owns_keys) {
  device::mbarrier_init(&barriers.owned_full, 1);
  device::mbarrier_init(&barriers.owned_empty, kConsumerWarps);
  for (int stage = 0; stage < shape.key_stages; ++stage) {
    device::mbarrier_init(&barriers.key_full[stage], 1);
    device::mbarrier_init(&barriers.key_empty[stage], kConsumerWarps);
  }
  for (int stage = 0; stage < shape.value_stages; ++stage) {
    device::mbarrier_init(&barriers.value_full[stage], 1);
    if (!owns_keys) device::mbarrier_init(&barriers.value_empty[stage], kConsumerWarps);
  }
  device::fence_mbarrier_init();
}

template <int kDim, bool kOwnsKeys>
struct BackwardTiles {
  static constexpr BackwardShape kShape = backward_shape(kDim, kOwnsKeys);
  static_assert(kShape.key_stages <= kMostStages && kShape.value_stages <= kMostStages, "a barrier for each stage");
  static constexpr int kOwned = kShape.owned, kIterated = kShape.iterated;
  static constexpr int kKeyStages = kShape.key_stages, kValueStages = kShape.value_stages;
  static constexpr int kPanels = kDim / kPanelDim;
  static constexpr int kOwnedBytes = tile_bytes(kOwned, kDim), kIteratedBytes = tile_bytes(kIterated, kDim);

  static __device__ __forceinline__ unsigned char* owned_key_dim() { return device::dynamic_shared(); }
  static __device__ __forceinline__ unsigned char* owned_value_dim() { return owned_key_dim() + kOwnedBytes; }
  static __device__ __forceinline__ unsigned char* key_dim(int stage) {
    return owned_key_dim() + 2 * kOwnedBytes + stage * kIteratedBytes;
  }
  static __device__ __forceinline__ unsigned char* value_dim(int stage) { return key_dim(kKeyStages + stage); }
  // With kOwnsKeys, beside key_dim(stage): what weight() subtracts for each query, then delta.
  static __device__ __forceinline__ float* row_values(int stage) {
    return reinterpret_cast<float*>(key_dim(kKeyStages + kValueStages)) + stage * 2 * kIterated;
  }

  // Copies the panels of a tile of ``rows`` rows. Called by one thread.
  static __device__ __forceinline__ void copy(unsigned char* tile, const device::TensorMap& map, int rows, int row,
                                              unsigned head, unsigned batch, device::Mbarrier* full) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const int at[] = {panel * kPanelDim, row, static_cast<int>(head), static_cast<int>(batch)};
      device::tensor_load(tile + panel * panel_bytes(rows), map, at, full);
    }
  }

  // scores = owned iterated^T, of the consumer's 64 owned rows; both tiles have the key dim, or the value dim.
  template <typename T>
  static __device__ __forceinline__ void multiply_rows(float (&scores)[kIterated / 8][4], unsigned char* owned,
                                                       unsigned char* iterated, int group) {
    using device::Rows;
    const auto left = device::matrix_tile<Rows::kOuter>(owned + group * panel_bytes(kGroupRows));
    const auto right = device::matrix_tile<Rows::kOuter>(iterated);
#pragma unroll
    for (int k = 0; k < kDim; k += device::kWgmmaDepth) {
      const int panel = k / kPanelDim, across = k % kPanelDim * static_cast<int>(sizeof(T));
      device::wgmma<T>(scores, left.from(panel * panel_bytes(kOwned) + across),
                       right.from(panel * panel_bytes(kIterated) + across), k > 0);
    }
    device::wgmma_commit();
  }

  // sums += weights iterated.
  static constexpr int kDepths = kIterated / device::kWgmmaDepth;
  template <typename T>
  static __device__ __forceinline__ void multiply_weights(float (&sums)[kDim / 8][4],
                                                          const uint32_t (&weights)[kDepths][4],
                                                          unsigned char* iterated) {
    const auto right = device::matrix_tile<device::Rows::kDepth>(iterated, panel_bytes(kIterated));
#pragma unroll
    for (int k = 0; k < kDepths; ++k) {
      device::wgmma<T>(sums, weights[k], right.from(k * device::kWgmmaDepth * kPanelRowBytes));
    }
    device::wgmma_commit();
  }
};

// Delta of a query.
__device__ __forceinline__ float* delta_of(const BackwardParams& p, unsigned batch, unsigned head, int query) {
  return p.delta + (static_cast<int64_t>(batch) * p.problem.heads + head) * p.problem.queries + query;
}

// Multiplies scores by a factor that is not positive, and returns the factor that remains: mask_scores in ../mask.cuh.
template <int kTiles>
__device__ __forceinline__ float positive_factor(float (&scores)[kTiles][4], float factor) {
  if (factor > 0.0f) return factor;
#pragma unroll
  for (auto& tile : scores) {
#pragma unroll
    for (float& score : tile) score *= factor;
  }
  return 1.0f;
}

// Left operands of products from the fragments of scores.
template <typename T, int kTiles>
__device__ __forceinline__ void pack_scores(uint32_t (&packed)[kTiles / 2][4], const float (&scores)[kTiles][4]) {
#pragma unroll
  for (int k = 0; k < kTiles / 2; ++k) Product<T>::from_scores(packed[k], scores + 2 * k);
}

}  // namespace fastgen::attention::sm90
