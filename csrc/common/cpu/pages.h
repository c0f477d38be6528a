// Transparent huge pages for outputs and work memory.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastgen::cpu {

// A large array is usually memory that the process has not touched before: the first write to each 4 KiB page faults,
// and on a virtual machine the faults of a streaming kernel cost more than its arithmetic. Requests 2 MiB pages inside
// [data, data + bytes). A hint: failure is ignored.
inline void prefer_large_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  if (data == nullptr || bytes < 4 * kPage) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace fastgen::cpu
