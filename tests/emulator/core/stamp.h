// One memory access in 64 bits: who, when and where.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastgen::emulator {

using Site = uintptr_t;  // a return address in a kernel

// Zero is no access. Epoch 0 is before the launch. The top bit turns the word into a reference: a set of
// readers (see readers.h), or an asynchronous write on its way (see async_copy.cpp).
struct Stamp {
  static constexpr uint64_t kThreads = 1 << 10, kEpochs = 1 << 20, kBlocks = 1 << 18, kSites = 1 << 14;
  static constexpr uint64_t kAtomic = uint64_t{1} << 62, kReference = uint64_t{1} << 63;

  uint64_t bits = 0;

  static Stamp make(uint64_t thread, uint64_t epoch, uint64_t block, uint64_t site) {
    return {thread | epoch << 10 | (block % kBlocks) << 30 | (site % kSites) << 48};
  }
  static Stamp before_launch() { return make(0, 0, 0, kSites - 1); }
  static Stamp reference(uint64_t index) { return {kReference | index}; }

  int thread() const { return static_cast<int>(bits & (kThreads - 1)); }
  uint32_t epoch() const { return static_cast<uint32_t>(bits >> 10 & (kEpochs - 1)); }
  uint64_t block() const { return bits >> 30 & (kBlocks - 1); }
  uint32_t site() const { return static_cast<uint32_t>(bits >> 48 & (kSites - 1)); }
  bool none() const { return bits == 0; }
  bool atomic() const { return (bits & kAtomic) != 0; }
  bool is_reference() const { return (bits & kReference) != 0; }
  uint64_t index() const { return bits & ~kReference; }
  bool operator==(const Stamp&) const = default;
};

}  // namespace fastgen::emulator
