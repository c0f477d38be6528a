// Standard normals of many Philox counters at once.
#pragma once

#include <cstdint>

namespace fastgen::cpu {

// noise[4 g + i] = normal i of group first + g, for 0 <= g < groups: normal_group of common/philox.h, vectorized.
void standard_normals(uint64_t seed, uint64_t first, int64_t groups, float* noise);

}  // namespace fastgen::cpu
