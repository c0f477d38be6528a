#include "attention/cpu/softmax.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "common/cpu/levels.h"
#include "common/cpu/sums.h"
#include "common/math.h"

namespace fastgen::cpu {
namespace {

constexpr int64_t kLanes = 64;  // parallel partial sums: four AVX-512 vectors

template <bool kKeep>
FASTGEN_HOST_DEVICE void forward_row(const SoftmaxParams& p, int64_t index) {
  const int64_t keys = p.keys, at = index * keys;
  float* __restrict__ scores = p.scores + at;
  const float* __restrict__ keep = kKeep ? p.keep + at : nullptr;
  const float row_max = largest<kLanes>(keys, [=](int64_t j) { return scores[j]; });
  const float shift = row_max == -INFINITY ? 0.0f : row_max;  // -inf - -inf is NaN
  // largest ignores NaN, which the logsumexp does not.
  const bool infinite = row_max == INFINITY && std::none_of(scores, scores + keys, [](float x) { return x != x; });
  for (int64_t j = 0; j < keys; ++j) scores[j] = exp_float(scores[j] - shift);
  const float total = sum_row<kLanes>(keys, [=](int64_t j) { return scores[j]; });
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  for (int64_t j = 0; j < keys; ++j) scores[j] *= kKeep ? inverse * keep[j] : inverse;
  p.lse[index] = infinite ? INFINITY : total == 0.0f ? -INFINITY : shift + std::log(total);
}

template <bool kKeep>
FASTGEN_HOST_DEVICE void backward_row(const SoftmaxParams& p, int64_t index) {
  const int64_t keys = p.keys, at = index * keys;
  float* __restrict__ scores = p.scores + at;
  float* __restrict__ grads = p.grads + at;
  const float* __restrict__ keep = kKeep ? p.keep + at : nullptr;
  const float lse = p.lse[index], delta = p.delta[index];
  const float shift = lse == -INFINITY ? 0.0f : lse == INFINITY ? NAN : lse;  // an infinite score: NaN by the formula
  for (int64_t j = 0; j < keys; ++j) {
    const float weight = exp_float(scores[j] - shift), factor = kKeep ? keep[j] : 1.0f;
    scores[j] = weight * factor;
    grads[j] = weight * (grads[j] * factor - delta);
  }
}

FASTGEN_HOST_DEVICE void forward(const SoftmaxParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    p.keep == nullptr ? forward_row<false>(p, row) : forward_row<true>(p, row);
}

FASTGEN_HOST_DEVICE void backward(const SoftmaxParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    p.keep == nullptr ? backward_row<false>(p, row) : backward_row<true>(p, row);
  }
}

template <typename Body>
void for_rows(const SoftmaxParams& p, Body&& body) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, p.keys));
  torch::stable::parallel_for(0, p.rows, grain, body);
}

}  // namespace

void attention_softmax(const SoftmaxParams& p) {
  const auto run = for_level<forward>();
  for_rows(p, [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

void attention_softmax_backward(const SoftmaxParams& p) {
  const auto run = for_level<backward>();
  for_rows(p, [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

}  // namespace fastgen::cpu
