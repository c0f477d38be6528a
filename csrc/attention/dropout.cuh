// Dropout of the weights, regenerated from the seed in every pass and never stored.
//
// One Philox counter serves four consecutive weights of a row. A fragment holds them in several lanes, so each lane
// evaluates one counter and the lanes exchange the numbers by shuffles.
#pragma once

#include "attention/params.h"
#include "attention/tile.cuh"
#include "common/philox.h"
#include "device/warp.cuh"

namespace fastgen::attention {

// Which scores of a lane are kept, one bit each, four for a fragment.
template <int kFragments, int kTiles>
struct KeptScores {
  static constexpr int kAll = kFragments * kTiles, kPerWord = 8;  // fragments
  uint32_t bits[(kAll + kPerWord - 1) / kPerWord] = {};
  float factor = 0.0f;

  // four_bits(m, tile): of one fragment. The loop is not unrolled: a fragment takes about 100 instructions.
  template <typename Bits>
  __device__ __forceinline__ void set(Bits&& four_bits) {
#pragma unroll
    for (int first = 0; first < kAll; first += kPerWord) {
      uint32_t found = 0;
#pragma unroll 1
      for (int i = 0; i < (kAll - first < kPerWord ? kAll - first : kPerWord); ++i) {
        found |= four_bits((first + i) / kTiles, (first + i) % kTiles) << (4 * i);
      }
      bits[first / kPerWord] = found;
    }
  }
  __device__ __forceinline__ void apply(float (&scores)[kFragments][kTiles][4]) const {
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int first = (m * kTiles + tile) * 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores[m][tile][i] *= (bits[first / 32] & 1u << (first % 32 + i)) != 0 ? factor : 0.0f;
        }
      }
    }
  }
};

struct HeadDropout {
  uint64_t seed, first_group, groups_per_row;
  float p, factor;

  __device__ __forceinline__ HeadDropout(const Problem& problem, int64_t first_row)
      : groups_per_row(ceil_div(problem.keys, kGroup)), p(problem.dropout.p) {
    const Dropout& dropout = problem.dropout;
    const int64_t seed_index = first_row < dropout.rows_per_seed ? 0 : first_row / dropout.rows_per_seed;
    seed = static_cast<uint64_t>(dropout.seeds[seed_index]);
    first_group = static_cast<uint64_t>(first_row - seed_index * dropout.rows_per_seed) * groups_per_row;
    factor = 1.0f / (1.0f - p);
  }

  // Random numbers of keys key ... key + 3; key is a multiple of four.
  __device__ __forceinline__ Philox4 numbers(int query, int key) const {
    return philox(seed, first_group + query * groups_per_row + key / kGroup, kDropoutStream);
  }
  // Factors of the weights of a fragment of scores from (query, key) on: 1 / (1 - p) or 0.
  template <int kFragments, int kTiles>
  __device__ __forceinline__ KeptScores<kFragments, kTiles> kept(int query, int key) const {
    KeptScores<kFragments, kTiles> result;
    result.factor = factor;
    result.set([&](int m, int tile) { return four_bits(query + m * kFragmentRows, key + tile * 8); });
    return result;
  }
  // The same for scores whose rows are keys and whose columns are queries.
  template <int kFragments, int kTiles>
  __device__ __forceinline__ KeptScores<kFragments, kTiles> kept_transposed(int query, int key) const {
    KeptScores<kFragments, kTiles> result;
    result.factor = factor;
    result.set([&](int m, int tile) { return four_bits_transposed(query + tile * 8, key + m * kFragmentRows); });
    return result;
  }

  // Of one weight.
  __device__ __forceinline__ float factor_of(int query, int key) const {
    const Philox4 four = numbers(query, key / kGroup * kGroup);
    const uint32_t low = key % 2 == 0 ? four.x[0] : four.x[1], high = key % 2 == 0 ? four.x[2] : four.x[3];
    return to_uniform(key % kGroup < 2 ? low : high) >= p ? factor : 0.0f;
  }

 private:
  __device__ __forceinline__ uint32_t bits_of(uint32_t a, uint32_t b, uint32_t c, uint32_t d) const {
    const auto bit = [&](uint32_t number, int i) { return to_uniform(number) >= p ? 1u << i : 0u; };
    return bit(a, 0) | bit(b, 1) | bit(c, 2) | bit(d, 3);
  }

  // Of a 16 x 8 fragment of queries x keys.
  __device__ __forceinline__ uint32_t four_bits(int query, int key) const {
    // Lanes t and t ^ 1 share counters: the even lane evaluates row g, the odd one row g + 8.
    const bool odd = threadIdx.x % 2 != 0;
    const Philox4 own = numbers(query + lane_row() + (odd ? 8 : 0), key + lane_column() / kGroup * kGroup);
    const uint32_t first = device::shuffle_xor(odd ? own.x[0] : own.x[2], 1);
    const uint32_t second = device::shuffle_xor(odd ? own.x[1] : own.x[3], 1);
    return bits_of(odd ? first : own.x[0], odd ? second : own.x[1], odd ? own.x[2] : first, odd ? own.x[3] : second);
  }

  // Of a 16 x 8 fragment of keys x queries.
  __device__ __forceinline__ uint32_t four_bits_transposed(int query, int key) const {
    // Lanes with g = 4 a + c and equal a share four counters, of two queries and two groups of keys: lane c evaluates
    // that of element c, with query c % 2 and group c / 2. Its number j belongs to element c of lane j: a 4 x 4
    // transpose.
    const int g = lane_row(), c = g % 4;
    Philox4 n = numbers(query + lane_column() + c % 2, key + c / 2 * 8 + g / 4 * 4);
    exchange(n.x[0], n.x[1], c % 2 != 0, 4), exchange(n.x[2], n.x[3], c % 2 != 0, 4);
    exchange(n.x[0], n.x[2], c / 2 != 0, 8), exchange(n.x[1], n.x[3], c / 2 != 0, 8);
    return bits_of(n.x[0], n.x[1], n.x[2], n.x[3]);
  }

  // One step of the transpose: the lower lane exchanges its second for the upper lane's first.
  static __device__ __forceinline__ void exchange(uint32_t& first, uint32_t& second, bool upper, int lanes) {
    const uint32_t other = device::shuffle_xor(upper ? first : second, lanes);
    first = upper ? other : first, second = upper ? second : other;
  }
};

}  // namespace fastgen::attention
