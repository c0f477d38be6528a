#include "attention/cpu/dropout.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/cpu/levels.h"
#include "common/cpu/philox.h"
#include "common/philox.h"

namespace fastgen::cpu {
namespace {

constexpr int64_t kGroupsAtOnce = 512;
constexpr int64_t kGrain = 8192;  // weights per task

// Factors of ``groups`` groups from their Philox bits.
FASTGEN_HOST_DEVICE void keep_groups(const uint32_t (&bits)[kGroup][kGroupsAtOnce], int64_t groups, float p,
                                     float factor, float* __restrict__ out) {
  for (int64_t g = 0; g < groups; ++g) {
    for (int i = 0; i < kGroup; ++i) out[g * kGroup + i] = to_uniform(bits[i][g]) >= p ? factor : 0.0f;
  }
}

}  // namespace

void dropout_keep_row(const DropoutParams& p, int64_t row, float* out) {
  const int64_t seed_index = row / p.rows_per_seed;
  const uint64_t seed = static_cast<uint64_t>(p.seeds[seed_index]);
  const int64_t row_groups = ceil_div(p.keys, kGroup), first_of_row = row % p.rows_per_seed * row_groups;
  uint32_t bits[kGroup][kGroupsAtOnce];
  float weights[kGroup * kGroupsAtOnce];
  const auto keep = for_level<keep_groups>();
  uint32_t* const components[] = {bits[0], bits[1], bits[2], bits[3]};
  const int64_t last_group = ceil_div(p.last_key, kGroup);
  for (int64_t group = p.first_key / kGroup; group < last_group; group += kGroupsAtOnce) {
    const int64_t groups = std::min(kGroupsAtOnce, last_group - group);
    philox_bits(seed, static_cast<uint64_t>(first_of_row + group), groups, kDropoutStream, components);
    keep(bits, groups, p.p, p.factor, weights);
    const int64_t from = std::max(p.first_key, group * kGroup), to = std::min(p.last_key, (group + groups) * kGroup);
    std::copy(weights + (from - group * kGroup), weights + (to - group * kGroup), out + (from - p.first_key));
  }
}

void dropout_keep(const DropoutParams& p) {
  const int64_t columns = p.last_key - p.first_key, rows = p.batches * p.heads * p.queries;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = p.first_batch * p.heads + i / p.queries;
      dropout_keep_row(p, head * p.length + p.first_query + i % p.queries, p.keep + i * columns);
    }
  });
}

}  // namespace fastgen::cpu
