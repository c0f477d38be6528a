// Adds the parts of attention whose keys are split over blocks (decode.cuh, wide.cuh): with (O_s, m_s, l_s) from each
// split s and m the maximum of m_s,
//
//   out = sum of 2^(m_s - m) O_s / l        l = sum of 2^(m_s - m) l_s        lse = m ln 2 + log l
//
// A block per query and head. Warp w adds splits w, w + kCombineWarps, ..., then the warps are added, always in this
// order.
//
// gridDim = batch * heads * queries.
#pragma once

#include "attention/plan.h"
#include "attention/scheduler.cuh"
#include "attention/softmax.cuh"
#include "common/reduce.cuh"
#include "device/barrier.cuh"
#include "device/math.cuh"
#include "device/shared.cuh"
#include "device/vector.cuh"

namespace fastgen::attention {

constexpr int kCombineWarps = 4, kCombineThreads = 32 * kCombineWarps;
constexpr int kCombineInFlight = 4;  // splits whose parts a warp reads together

// The factor of sums whose maximum is ``own``, where that of all is ``all``.
__device__ __forceinline__ float rescaled(float own, float all) {
  return device::exp2_approx(own - (all == -INFINITY ? 0.0f : all));
}

__device__ __forceinline__ void store_four(float* target, const float (&values)[4]) {
  device::store_vector(target, values);
}
template <typename T>
__device__ __forceinline__ void store_four(T* target, const float (&values)[4]) {
  const uint32_t words[2] = {device::pack<T>(values[0], values[1]), device::pack<T>(values[2], values[3])};
  device::store_words(target, words);
}

template <int kColumns>
struct alignas(16) CombinedParts {
  float of[kCombineWarps][kColumns];
};

// kColumns: at least value_dim.
template <typename T, int kColumns>
__global__ void __launch_bounds__(kCombineThreads) attention_combine(ForwardParams p) {
  static_assert(kColumns % (4 * device::kWarpSize) == 0 && kColumns <= 4 * kCombineThreads, "four columns of a thread");
  static_assert(kMaxSplits == 2 * device::kWarpSize, "a lane holds the states of two splits");
  constexpr int kFours = kColumns / (4 * device::kWarpSize);  // of a lane
  const Problem& problem = p.problem;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32), splits = p.splits;
  const int64_t rows = int64_t{problem.batch} * problem.heads * problem.queries, row = blockIdx.x;
  const float* states = p.parts + splits * rows * problem.value_dim;

  Softmax total;
  float own_max[2], own_sum[2], factors[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int split = half * device::kWarpSize + lane;
    const float* state = states + (split * rows + row) * 2;
    own_max[half] = split < splits ? state[0] : -INFINITY, own_sum[half] = split < splits ? state[1] : 0.0f;
    total.row_max[0] = fmaxf(total.row_max[0], own_max[half]);
  }
  for (int lanes = device::kWarpSize / 2; lanes > 0; lanes /= 2) {
    total.row_max[0] = fmaxf(total.row_max[0], device::shuffle_xor(total.row_max[0], lanes));
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    factors[half] = rescaled(own_max[half], total.row_max[0]);
    total.row_sum[0] += own_sum[half] * factors[half];
  }
  total.row_sum[0] = team_sum(total.row_sum[0], device::kWarpSize);

  float sums[kFours][4] = {};
  for (int first = warp; first < splits; first += kCombineWarps * kCombineInFlight) {
    float parts[kCombineInFlight][kFours][4];
#pragma unroll
    for (int i = 0; i < kCombineInFlight; ++i) {
      const int split = first + i * kCombineWarps;
      const float* part = p.parts + (split * rows + row) * problem.value_dim;
#pragma unroll
      for (int four = 0; four < kFours; ++four) {
        const int column = (four * device::kWarpSize + lane) * 4;
        const bool exists = split < splits && column < problem.value_dim;
        if (exists) device::load_vector(part + column, parts[i][four]);
#pragma unroll
        for (int k = 0; k < 4; ++k) parts[i][four][k] = exists ? parts[i][four][k] : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kCombineInFlight; ++i) {
      const int split = first + i * kCombineWarps;
      const float factor = device::shuffle(split < device::kWarpSize ? factors[0] : factors[1], split);
      if (split >= splits) continue;
#pragma unroll
      for (int four = 0; four < kFours; ++four) {
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[four][k] += factor * parts[i][four][k];
      }
    }
  }
  auto& shared = device::shared_variable<CombinedParts<kColumns>>();
#pragma unroll
  for (int four = 0; four < kFours; ++four) {
    device::store_vector(shared.of[warp] + (four * device::kWarpSize + lane) * 4, sums[four]);
  }
  device::sync_block();
  const int column = static_cast<int>(threadIdx.x) * 4;
  const auto batch_head = static_cast<unsigned>(row / problem.queries);
  const auto query = static_cast<unsigned>(row % problem.queries);
  const unsigned batch = batch_head / problem.heads, head = batch_head % problem.heads;
  if (column < problem.value_dim) {
    float all[4] = {};
#pragma unroll
    for (int i = 0; i < kCombineWarps; ++i) {
      float part[4];
      device::load_vector(shared.of[i] + column, part);
#pragma unroll
      for (int k = 0; k < 4; ++k) all[k] += part[k];
    }
#pragma unroll
    for (float& value : all) value *= total.inverse(0);
    store_four(row_pointer<T>(p.out, batch, head, query) + column, all);
  }
  if (threadIdx.x == 0) *row_pointer(p.lse, batch, head, query) = total.lse(0);
}

}  // namespace fastgen::attention
