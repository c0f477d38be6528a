#include "core/slots.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace fastgen::emulator {

namespace {

// Virtual addresses cost nothing: pages exist once they are touched. Freed slots are reused, the last one first.
constexpr size_t kSlotBytes = size_t{1} << 26, kSlots = size_t{1} << 14, kMostBytes = kSlotBytes / 4;
constexpr size_t kPage = 4096, kAround = 512;
constexpr size_t kKeptBytes = size_t{1} << 18;  // of a freed slot; the rest goes back to the system

class Slots {
 public:
  Slots() {
    void* memory =
        mmap(nullptr, kSlotBytes * kSlots, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return;  // a limit on address space: allocations lie side by side
    madvise(memory, kSlotBytes * kSlots, MADV_NOHUGEPAGE);
    base_ = static_cast<char*>(memory);
  }

  void* take(size_t bytes) {
    if (base_ == nullptr || bytes > kMostBytes) return aside(bytes);
    const std::lock_guard lock(mutex_);
    if (free_.empty() && used_ == kSlots) return aside(bytes);
    size_t slot = used_;
    if (free_.empty()) {
      ++used_;
    } else {
      slot = free_.back();
      free_.pop_back();
    }
    most_[slot] = bytes > kKeptBytes;
    return base_ + slot * kSlotBytes + begin_of(slot);
  }

  void give(void* memory) {
    char* const address = static_cast<char*>(memory);
    if (base_ == nullptr || static_cast<size_t>(address - base_) >= kSlotBytes * kSlots) {
      std::free(address - kAround);
      return;
    }
    const size_t slot = static_cast<size_t>(address - base_) / kSlotBytes;
    const std::lock_guard lock(mutex_);
    if (most_[slot]) madvise(address + kKeptBytes, kMostBytes - kKeptBytes, MADV_DONTNEED);
    free_.push_back(slot);
  }

 private:
  // Not the same in all slots: an address that is off by 2^32 must not hit another slot's memory.
  static size_t begin_of(size_t slot) { return kSlotBytes / 4 + slot * 2654435761u % 2048 * kPage; }

  static void* aside(size_t bytes) {
    auto* memory = static_cast<char*>(std::aligned_alloc(kAround, (bytes + 3 * kAround - 1) / kAround * kAround));
    if (memory == nullptr) throw std::bad_alloc();
    return memory + kAround;
  }

  char* base_ = nullptr;
  std::mutex mutex_;
  size_t used_ = 0;
  std::vector<size_t> free_;
  std::vector<bool> most_ = std::vector<bool>(kSlots);  // whether the last allocation had more than kKeptBytes
};

Slots& slots() {
  static Slots* all = new Slots;  // never destroyed: tensors may be released at the process's end
  return *all;
}

}  // namespace

void* allocate(size_t bytes) { return slots().take(bytes); }

void release(void* memory) { slots().give(memory); }

}  // namespace fastgen::emulator
