// Gradients of key and value that several tasks add up: each has sums of its own, which are added in a fixed order.
#pragma once

#include <algorithm>

#include "attention/cpu/memory.h"
#include "attention/cpu/problem.h"
#include "attention/cpu/products.h"

namespace fastgen::cpu {

constexpr int64_t kManyTasks = 32;  // parallelism that is enough for a large machine
constexpr int64_t kManySums = 128;  // bounds the memory of the sums

// The number of tasks of a key head, which has ``items`` tiles of query rows. Does not depend on the threads.
inline int64_t parts_of(const Problem& p, int64_t items) {
  const int64_t key_heads = std::max<int64_t>(1, p.batch * p.key_heads),
                heads = std::max<int64_t>(1, p.batch * p.heads);
  return std::max<int64_t>(1, std::min({ceil_div(kManyTasks, key_heads), ceil_div(kManySums, heads), items}));
}

// (B, Hk, parts): Panels of grad_key (padded_keys, Dk), then of grad_value (padded_keys, Dv).
struct KeySums {
  int64_t key_heads, parts, padded_keys, size;  // size: floats of one part
  float* data;

  KeySums(const Problem& p, int64_t count)
      : key_heads(p.key_heads), parts(count), padded_keys(round_up(p.keys, kTile)) {
    size = padded_keys * (round_up(p.key_dim, kWidestPanel) + round_up(p.value_dim, kWidestPanel));
    memory_ = allocate(p.batch * p.key_heads * parts * size), data = memory_.get();
  }

  FASTGEN_HOST_DEVICE float* of(int64_t batch, int64_t key_head, int64_t part) const {
    return data + ((batch * key_heads + key_head) * parts + part) * size;
  }

 private:
  static constexpr int64_t kWidestPanel = 32;
  Memory memory_;
};

// Stores the gradients of ``rows`` keys from ``first`` on.
template <typename Product>
FASTGEN_HOST_DEVICE void store_key_sums(const KeySums& s, const Problem& p, const Result& grad_key,
                                        const Result& grad_value, int64_t batch, int64_t key_head, int64_t first,
                                        int64_t rows) {
  float *keys = s.of(batch, key_head, 0), *values = keys + Product::panels_size(s.padded_keys, p.key_dim);
  const int64_t panel = s.padded_keys * Product::kPanel, from = first * Product::kPanel;
  for (int64_t at = from; at < s.size; at += panel) {
    float* __restrict__ sum = keys + at;
    for (int64_t part = 1; part < s.parts; ++part) {
      const float* __restrict__ other = s.of(batch, key_head, part) + at;
      for (int64_t i = 0; i < rows * Product::kPanel; ++i) sum[i] += other[i];
    }
  }
  Product::unpack_panels(keys + from, s.padded_keys, rows, p.key_dim, 1.0f, grad_key.at(batch, key_head, first),
                         grad_key.strides[2]);
  Product::unpack_panels(values + from, s.padded_keys, rows, p.value_dim, 1.0f, grad_value.at(batch, key_head, first),
                         grad_value.strides[2]);
}

}  // namespace fastgen::cpu
