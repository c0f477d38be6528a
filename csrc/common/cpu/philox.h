// Philox bits for many counters at once.
#pragma once

#include <cstdint>

namespace fastgen::cpu {

// bits[i][g] = component i of philox(seed, first + g, stream), for 0 <= i < 4 and 0 <= g < groups.
void philox_bits(uint64_t seed, uint64_t first, int64_t groups, uint32_t stream, uint32_t* const* bits);

}  // namespace fastgen::cpu
