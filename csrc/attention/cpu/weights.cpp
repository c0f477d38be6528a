#include "attention/cpu/weights.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/cpu/levels.h"
#include "common/cpu/sums.h"
#include "common/math.h"

namespace fastgen::cpu {
namespace {

constexpr int64_t kLanes = 64;  // parallel partial sums: four AVX-512 vectors

template <bool kKeep, bool kGrads, bool kCross>
FASTGEN_HOST_DEVICE void weigh_row(const WeightsParams& p, int64_t index) {
  const int64_t keys = p.keys, at = index * keys;
  float* __restrict__ scores = p.scores + at;
  float* __restrict__ direction = p.direction + at;
  float* __restrict__ grads = kGrads ? p.grads + at : nullptr;
  float* __restrict__ cross = kCross ? p.cross + at : nullptr;
  const float* __restrict__ keep = kKeep ? p.keep + at : nullptr;
  const auto factor = [=](int64_t j) { return kKeep ? keep[j] : 1.0f; };
  const float lse = p.lse[index];
  for (int64_t j = 0; j < keys; ++j) scores[j] = exp_float(scores[j] - lse);
  // The logsumexp of half-precision scores differs from that of these scores: renormalize the weights to sum to 1.
  const float total = sum_row<kLanes>(keys, [=](int64_t j) { return scores[j]; });
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  for (int64_t j = 0; j < keys; ++j) scores[j] *= inverse;
  const float mean = sum_row<kLanes>(keys, [=](int64_t j) { return scores[j] * direction[j]; });
  p.row[index] = mean;
  if constexpr (!kGrads) {
    for (int64_t j = 0; j < keys; ++j) {
      const float weight = scores[j] * factor(j);
      scores[j] = weight * (direction[j] - mean);
      direction[j] = weight;
    }
  } else {
    const float delta = p.delta[index];
    // rowsum(dO * O')
    const float second_row = sum_row<kLanes>(keys, [=](int64_t j) {
      const float along = (direction[j] - mean) * grads[j];
      return scores[j] * factor(j) * (kCross ? along + cross[j] : along);
    });
    for (int64_t j = 0; j < keys; ++j) {
      const float weight = scores[j], centred = direction[j] - mean;
      const float first = weight * (grads[j] * factor(j) - delta);
      const float other = kCross ? cross[j] * factor(j) - second_row : -second_row;
      const float second = centred * first + weight * other;
      scores[j] = weight * factor(j) * centred;
      grads[j] = first;
      if constexpr (kCross) {
        cross[j] = second;
        direction[j] = weight * factor(j);
      } else {
        direction[j] = second;
      }
    }
  }
}

template <bool kKeep, bool kGrads, bool kCross>
FASTGEN_HOST_DEVICE void weigh_rows(const WeightsParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) weigh_row<kKeep, kGrads, kCross>(p, row);
}

FASTGEN_HOST_DEVICE void weigh(const WeightsParams& p, int64_t begin, int64_t end) {
  if (p.grads == nullptr) {
    p.keep == nullptr ? weigh_rows<false, false, false>(p, begin, end) : weigh_rows<true, false, false>(p, begin, end);
  } else if (p.cross == nullptr) {
    p.keep == nullptr ? weigh_rows<false, true, false>(p, begin, end) : weigh_rows<true, true, false>(p, begin, end);
  } else {
    p.keep == nullptr ? weigh_rows<false, true, true>(p, begin, end) : weigh_rows<true, true, true>(p, begin, end);
  }
}

}  // namespace

void attention_weights(const WeightsParams& p) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, p.keys));
  const auto run = for_level<weigh>();
  torch::stable::parallel_for(0, p.rows, grain, [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

}  // namespace fastgen::cpu
