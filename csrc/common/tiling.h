// Tile sizes shared by host and device.
#pragma once

#include "common/types.h"

namespace fastgen {

FASTGEN_HOST_DEVICE constexpr int smaller(int a, int b) { return a < b ? a : b; }
FASTGEN_HOST_DEVICE constexpr int larger(int a, int b) { return a > b ? a : b; }

// The number of elements of an array. Without std::size, whose <iterator> is as slow to parse as <string> (error.h).
template <typename T, int kLength>
constexpr int length(const T (&)[kLength]) {
  return kLength;
}

constexpr int kFragmentRows = 16;  // of an mma instruction
constexpr int kRowPadding = 16;    // bytes after each row of a tile in shared memory

// Maximum shared memory per block on every GPU from sm_80 on: sm_86, sm_89 and sm_120 have 99 KiB.
constexpr int kSharedLimit = 99 * 1024;

FASTGEN_HOST_DEVICE constexpr int row_bytes(int columns, int element_size) {
  return columns * element_size + kRowPadding;
}

}  // namespace fastgen
