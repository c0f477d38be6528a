// CUDA keywords on the host. ``__shared__`` has no twin: shared memory comes from device/shared.cuh.
#pragma once

#include "core/emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
// Encoded as so many no-operations before the kernel's entry, which emulator::launch_bound counts.
#if defined(__clang__)
#define __launch_bounds__(...)
#else
#define FASTGEN_BOUND(...) sizeof(fastgen::emulator::LaunchBounds<__VA_ARGS__>)
#define __launch_bounds__(...) \
  __attribute__((patchable_function_entry(FASTGEN_BOUND(__VA_ARGS__), FASTGEN_BOUND(__VA_ARGS__))))
#endif
#define __grid_constant__

// The source location of the call, for reports.
#define FASTGEN_WHERE emulator::Where where = emulator::Where::current()
