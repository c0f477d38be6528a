// Adds the parts of keys that blocks of attention_forward_wide have computed: with (O_s, m_s, l_s) of part s and m the
// maximum of m_s, in the order of the parts,
//
//   out = sum of 2^(m_s - m) O_s / l        l = sum of 2^(m_s - m) l_s        lse = m ln 2 + log l
//
// A warp per query and head. gridDim = (rows / kWideCombineRows).
#pragma once

#include <cmath>

#include "attention/scheduler.cuh"
#include "common/math.h"
#include "device/math.cuh"
#include "device/vector.cuh"

namespace fastgen::attention {

constexpr int kWideCombineRows = 8;  // of a block
constexpr int kWideCombineColumns = kWideHeadDims[length(kWideHeadDims) - 1].value;

template <typename T>
__global__ void __launch_bounds__(32 * kWideCombineRows) attention_forward_wide_combine(ForwardParams p) {
  constexpr int kFours = kWideCombineColumns / (4 * 32);  // of a lane
  const Problem& problem = p.problem;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t rows = int64_t{problem.batch} * problem.heads * problem.queries;
  const int64_t row = int64_t{blockIdx.x} * kWideCombineRows + threadIdx.x / 32;
  if (row >= rows) return;
  const float* states = p.parts + p.splits * rows * problem.value_dim;
  float row_max = -INFINITY, row_sum = 0.0f, sums[kFours][4] = {};
  for (int split = 0; split < p.splits; ++split) row_max = fmaxf(row_max, states[(split * rows + row) * 2]);
  const float shift = row_max == -INFINITY ? 0.0f : row_max;
  for (int split = 0; split < p.splits; ++split) {
    const float* state = states + (split * rows + row) * 2;
    const float factor = device::exp2_approx(state[0] - shift);
    row_sum += factor * state[1];
    const float* part = p.parts + (split * rows + row) * problem.value_dim;
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
      const int column = (four * 32 + lane) * 4;
      if (column < problem.value_dim) {
        float values[4];
        device::load_vector(part + column, values);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[four][i] += factor * values[i];
      }
    }
  }
  const auto head_row = static_cast<unsigned>(row / problem.queries),
             query = static_cast<unsigned>(row % problem.queries);
  const unsigned batch = head_row / problem.heads, head = head_row % problem.heads;
  const float inverse = row_sum == 0.0f ? 0.0f : 1.0f / row_sum;  // 0: a fully masked row
  T* const out = row_pointer<T>(p.out, batch, head, query);
#pragma unroll
  for (int four = 0; four < kFours; ++four) {
    const int column = (four * 32 + lane) * 4;
    if (column < problem.value_dim) {
      const float (&sum)[4] = sums[four];
      const uint32_t words[2] = {device::pack<T>(sum[0] * inverse, sum[1] * inverse),
                                 device::pack<T>(sum[2] * inverse, sum[3] * inverse)};
      device::store_words(out + column, words);
    }
  }
  const float lse = row_sum > 0.0f ? row_max * kLn2 + log_float(row_sum) : row_sum == 0.0f ? -INFINITY : row_sum;
  if (lane == 0) *row_pointer(p.lse, batch, head, query) = lse;
}

}  // namespace fastgen::attention
