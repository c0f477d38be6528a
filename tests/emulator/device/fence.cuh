// Host twin of csrc/device/fence.cuh.
#pragma once

#include "device/language.h"

namespace fastgen::device {

__forceinline__ void fence_async_proxy(FASTGEN_WHERE) { emulator::fence_async_proxy(where); }
__forceinline__ void fence_mbarrier_init(FASTGEN_WHERE) { emulator::fence_mbarrier_init(where); }

}  // namespace fastgen::device
