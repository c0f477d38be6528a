// Row sums in an order that does not depend on the machine.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/types.h"

namespace fastgen::cpu {

// The sum of term(j), with kLanes partial sums.
template <int64_t kLanes, typename Term>
FASTGEN_HOST_DEVICE float sum_row(int64_t count, Term term) {
  float lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] += term(j + i);
  }
  for (int64_t i = 0; j + i < count; ++i) lanes[i] += term(j + i);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The maximum of value(j), ignoring NaN; -inf if count is 0.
template <int64_t kLanes, typename Value>
FASTGEN_HOST_DEVICE float largest(int64_t count, Value value) {
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = -INFINITY;
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = value(j + i) > lanes[i] ? value(j + i) : lanes[i];
  }
  for (int64_t i = 0; j + i < count; ++i) lanes[i] = value(j + i) > lanes[i] ? value(j + i) : lanes[i];
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
  }
  return lanes[0];
}

}  // namespace fastgen::cpu
