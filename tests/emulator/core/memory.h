// The device memory a kernel may touch: allocations, the state of their bytes, and the block's shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/shadow.h"

namespace fastgen::emulator {

// One allocation of global memory.
struct Allocation {
  uintptr_t begin = 0;
  size_t bytes = 0;
  bool fresh = false;      // allocated by an operator, uninitialized
  bool read_only = false;  // must not be written by kernels

  static constexpr size_t kPageBytes = 256;
  struct Page {
    uint64_t launch = 0;  // cells are of this launch; those of an earlier one are reset on access
    Cell cells[kPageBytes];
  };
  std::vector<std::unique_ptr<Page>> pages;
};

// Fresh memory holds this byte until written: a NaN in every floating-point format.
constexpr int kPoison = 0xFF;

class GlobalMemory {
 public:
  void add(const void* begin, size_t bytes, bool fresh, bool read_only = false);
  void remove(const void* begin);
  // The allocation that holds the address, or the nearest one below it; null if there is none.
  Allocation* find(uintptr_t address);
  // The cells of a range within one page, ready for accesses of this launch.
  Cell* cells(Allocation& allocation, size_t offset, uint64_t launch);

 private:
  // The cells of a page on its first access.
  static void mark_written(const Allocation& allocation, Allocation::Page& page, size_t first);

  std::map<uintptr_t, Allocation> allocations_;
  Allocation* last_ = nullptr;
};

// The shared memory of one block: dynamic bytes, and the static variables used so far,
// separated by guard zones.
class SharedMemory {
 public:
  static constexpr size_t kMostBytes = 256 * 1024;
  static constexpr size_t kRedzone = 4096, kAlignment = 1024;

  struct Part {
    std::string name;
    size_t begin, bytes;
    const void* key;
  };

  SharedMemory();
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  void reset(size_t dynamic_bytes);
  char* dynamic() { return base_ + kRedzoneBegin; }
  size_t dynamic_bytes() const { return parts_[0].bytes; }
  // The static variable of this key (one for each type), made on first use. Null if there is no space.
  void* variable(const void* key, const char* name, size_t bytes, size_t alignment);
  size_t static_bytes() const { return static_bytes_; }

  bool holds(uintptr_t address) const { return address - reinterpret_cast<uintptr_t>(base_) < kArenaBytes; }
  size_t offset(uintptr_t address) const { return address - reinterpret_cast<uintptr_t>(base_); }
  char* at(size_t offset) { return base_ + offset; }
  // The part that holds all of the range, or null.
  const Part* part(size_t offset, size_t bytes) const;
  // "dynamic shared memory + 128", for messages.
  std::string describe(size_t offset) const;
  Cell* cells(size_t offset) { return &cells_[offset]; }

 private:
  static constexpr size_t kRedzoneBegin = kAlignment, kArenaBytes = 2 * kMostBytes;

  char* base_ = nullptr;
  std::vector<Part> parts_;  // the first is the dynamic one
  size_t next_ = 0, static_bytes_ = 0;
  std::vector<Cell> cells_;
};

}  // namespace fastgen::emulator
