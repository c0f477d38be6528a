// Address space for the memory that kernels are given: allocations lie far apart, so that an access that misses its own
// hits no other.
#pragma once

#include <cstddef>

namespace fastgen::emulator {

// Uninitialized memory, aligned like cudaMalloc's. Throws std::bad_alloc.
void* allocate(size_t bytes);
void release(void* memory);

}  // namespace fastgen::emulator
