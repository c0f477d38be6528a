// Host twin of csrc/device/math.cuh.
#pragma once

#include <cmath>
#include <limits>

#include "device/language.h"

namespace fastgen::device {

__forceinline__ float exp2_approx(float x) {
  const float result = exp2f(x);
  return result < std::numeric_limits<float>::min() ? 0.0f : result;  // keeps NaN
}

}  // namespace fastgen::device
