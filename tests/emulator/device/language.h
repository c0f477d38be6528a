// CUDA keywords on the host. ``__shared__`` has no twin: shared memory comes from device/shared.cuh.
#pragma once

#include "core/emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

// The source location of the call, for reports.
#define FASTGEN_WHERE emulator::Where where = emulator::Where::current()
