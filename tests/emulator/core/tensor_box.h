// The box of a tensor copy (PTX ISA, "Tensor swizzling modes"): rows of 128 bytes in shared memory, of which those
// outside the tensor are no part of the copy.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/emulator.h"

namespace fastgen::emulator {

constexpr int kBoxRowBytes = 128, kChunkBytes = 16;
constexpr size_t kBoxAlignment = 1024;  // of the swizzle pattern

// Where the byte at this offset of an aligned tile lies.
inline size_t swizzled(size_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

inline uint64_t rows_of(const TensorMap& map) { return uint64_t{map.box[1]} * map.box[2] * map.box[3]; }

// Calls body(row, first, valid, global) for each row of the box at ``at``: its bytes that lie in the tensor, from the
// ``first`` one on, and their address in global memory. With valid = 0 there are none.
template <typename Body>
void for_rows(const TensorMap& map, const int* at, Body&& body) {
  constexpr int kElementBytes = 2;
  const auto size = static_cast<int64_t>(map.sizes[0]);
  const int64_t first = std::clamp<int64_t>(-int64_t{at[0]}, 0, map.box[0]);
  const int64_t end = std::clamp<int64_t>(size - at[0], first, map.box[0]);
  const uint64_t rows = rows_of(map);
  for (uint64_t row = 0; row < rows; ++row) {
    const int64_t position[] = {at[1] + static_cast<int64_t>(row % map.box[1]),
                                at[2] + static_cast<int64_t>(row / map.box[1] % map.box[2]),
                                at[3] + static_cast<int64_t>(row / map.box[1] / map.box[2])};
    bool inside = end > first;
    int64_t distance = (at[0] + first) * kElementBytes;
    for (int dim = 0; dim < 3; ++dim) {
      inside = inside && position[dim] >= 0 && position[dim] < static_cast<int64_t>(map.sizes[dim + 1]);
      distance += position[dim] * static_cast<int64_t>(map.strides[dim]);
    }
    if (inside) {
      body(row, static_cast<int>(first) * kElementBytes, static_cast<int>(end - first) * kElementBytes,
           map.data + distance);
    } else {
      body(row, 0, 0, uintptr_t{0});
    }
  }
}

}  // namespace fastgen::emulator
