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

// Maximum shared memory of a block, in bytes. The GPU's own limit is known at run time only: a library built for sm_80
// also runs on sm_86.
constexpr int kSharedLimit = 99 * 1024;     // sm_86, sm_89, sm_120: what every GPU from sm_80 on has
constexpr int kSharedLimit80 = 163 * 1024;  // sm_80, sm_87
constexpr int kSharedLimit90 = 227 * 1024;  // sm_90, sm_100, sm_103, sm_110

// A multiprocessor has this much more than a block may have, and each of its blocks takes this much besides its own.
constexpr int kSystemShared = 1024;
constexpr int blocks_by_shared_memory(int bytes, int shared_limit) {
  return (shared_limit + kSystemShared) / (bytes + kSystemShared);
}

FASTGEN_HOST_DEVICE constexpr int row_bytes(int columns, int element_size) {
  return columns * element_size + kRowPadding;
}

}  // namespace fastgen
