// Which weights dropout takes: regenerated from the seed wherever a score is, never stored.
//
// Four weights of a row, beginning at a multiple of four, come from one counter. A fragment has them in several lanes,
// so each lane makes the numbers of one counter and they exchange what they need.
#pragma once

#include "attention/params.h"
#include "attention/tile.cuh"
#include "common/philox.h"
#include "device/warp.cuh"

namespace fastgen::attention {

struct HeadDropout {
  uint64_t seed, first_group, groups_per_row;
  float p, factor;

  __device__ __forceinline__ HeadDropout(const Problem& problem, int64_t first_row)
      : groups_per_row(ceil_div(problem.keys, kGroup)), p(problem.dropout.p) {
    const Dropout& dropout = problem.dropout;
    const int64_t which = first_row < dropout.rows_per_seed ? 0 : first_row / dropout.rows_per_seed;
    seed = static_cast<uint64_t>(dropout.seeds[which]);
    first_group = static_cast<uint64_t>(first_row - which * dropout.rows_per_seed) * groups_per_row;
    factor = 1.0f / (1.0f - p);
  }

  // The four numbers of keys key ... key + 3, with key a multiple of four.
  __device__ __forceinline__ Philox4 numbers(int query, int key) const {
    return philox(seed, first_group + query * groups_per_row + key / kGroup, kDropoutStream);
  }
  // What a weight is multiplied with.
  __device__ __forceinline__ float of(uint32_t number) const { return to_uniform(number) >= p ? factor : 0.0f; }

  // The factors of a fragment whose rows are queries from ``query`` on and whose columns are keys from ``key`` on.
  __device__ __forceinline__ void factors(float (&result)[4], int query, int key) const {
    // Lanes t and t ^ 1 share counters: the even one makes row g's numbers, the odd one row g + 8's.
    const bool odd = threadIdx.x % 2 != 0;
    const Philox4 own = numbers(query + lane_row() + (odd ? 8 : 0), key + lane_column() / kGroup * kGroup);
    const uint32_t first = device::shuffle_xor(odd ? own.x[0] : own.x[2], 1);
    const uint32_t second = device::shuffle_xor(odd ? own.x[1] : own.x[3], 1);
    result[0] = of(odd ? first : own.x[0]), result[1] = of(odd ? second : own.x[1]);
    result[2] = of(odd ? own.x[2] : first), result[3] = of(odd ? own.x[3] : second);
  }

  // The same of a fragment whose rows are keys and whose columns are queries.
  __device__ __forceinline__ void factors_transposed(float (&result)[4], int query, int key) const {
    // Lanes with g = 4 a + c, for one a, share four counters, of two queries and two groups of keys: lane c makes those
    // of element c, which has query c % 2 and group c / 2. Number j of it is what lane j wants for its element c.
    const int g = lane_row(), c = g % 4;
    Philox4 n = numbers(query + lane_column() + c % 2, key + c / 2 * 8 + g / 4 * 4);
    exchange(n.x[0], n.x[1], c % 2 != 0, 4), exchange(n.x[2], n.x[3], c % 2 != 0, 4);
    exchange(n.x[0], n.x[2], c / 2 != 0, 8), exchange(n.x[1], n.x[3], c / 2 != 0, 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) result[i] = of(n.x[i]);
  }

 private:
  // One step of a transposition: the lower lane gives its second for the upper lane's first.
  static __device__ __forceinline__ void exchange(uint32_t& first, uint32_t& second, bool upper, int lanes) {
    const uint32_t other = device::shuffle_xor(upper ? first : second, lanes);
    first = upper ? other : first, second = upper ? second : other;
  }
};

}  // namespace fastgen::attention
