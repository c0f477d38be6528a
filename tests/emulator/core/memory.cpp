#include "core/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

namespace fastgen::emulator {

void GlobalMemory::add(const void* begin, size_t bytes, bool fresh, bool read_only) {
  if (fresh) memset(const_cast<void*>(begin), kPoison, bytes);
  const auto address = reinterpret_cast<uintptr_t>(begin);
  Allocation allocation;
  allocation.begin = address, allocation.bytes = bytes, allocation.fresh = fresh, allocation.read_only = read_only;
  allocation.pages.resize((bytes + Allocation::kPageBytes - 1) / Allocation::kPageBytes);
  allocations_.insert_or_assign(address, std::move(allocation));
  last_ = nullptr;
}

void GlobalMemory::remove(const void* begin) {
  allocations_.erase(reinterpret_cast<uintptr_t>(begin));
  last_ = nullptr;
}

Allocation* GlobalMemory::find(uintptr_t address) {
  if (last_ != nullptr && address - last_->begin < last_->bytes) return last_;
  auto above = allocations_.upper_bound(address);
  if (above == allocations_.begin()) return nullptr;
  return last_ = &std::prev(above)->second;
}

// An operator may itself fill what it allocates, by PyTorch: a group of bytes that is no longer all poison was written.
void GlobalMemory::mark_written(const Allocation& allocation, Allocation::Page& page, size_t first) {
  constexpr size_t kGroup = 16;
  const auto* bytes = reinterpret_cast<const unsigned char*>(allocation.begin + first);
  const size_t count = std::min(Allocation::kPageBytes, allocation.bytes - first);
  for (size_t i = 0; i < count; i += kGroup) {
    const size_t end = std::min(i + kGroup, count);
    const auto poisoned = [](unsigned char byte) { return byte == kPoison; };
    if (allocation.fresh && std::all_of(bytes + i, bytes + end, poisoned)) continue;
    std::fill(page.cells + i, page.cells + end, Cell{Stamp::before_launch(), {}});
  }
}

Cell* GlobalMemory::cells(Allocation& allocation, size_t offset, uint64_t launch) {
  std::unique_ptr<Allocation::Page>& page = allocation.pages[offset / Allocation::kPageBytes];
  if (page == nullptr) {
    page = std::make_unique<Allocation::Page>();
    page->launch = launch;
    mark_written(allocation, *page, offset / Allocation::kPageBytes * Allocation::kPageBytes);
  } else if (page->launch != launch) {
    // Kernels of one stream run in order: whatever an earlier one did comes before.
    page->launch = launch;
    for (Cell& cell : page->cells) cell = {cell.write.none() ? Stamp{} : Stamp::before_launch(), {}};
  }
  return &page->cells[offset % Allocation::kPageBytes];
}

SharedMemory::SharedMemory() {
  void* memory = mmap(nullptr, kArenaBytes + kAlignment, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<char*>(memory);  // page-aligned, so aligned to kAlignment
  cells_.resize(kArenaBytes);
  reset(0);
}

SharedMemory::~SharedMemory() { munmap(base_, kArenaBytes + kAlignment); }

void SharedMemory::reset(size_t dynamic_bytes) {
  for (const Part& part : parts_) std::fill_n(cells_.begin() + part.begin, part.bytes, Cell{});
  parts_.assign(1, {"dynamic shared memory", kRedzoneBegin, dynamic_bytes, nullptr});
  next_ = kRedzoneBegin + dynamic_bytes + kRedzone;
  static_bytes_ = 0;
  memset(dynamic(), kPoison, dynamic_bytes);
}

void* SharedMemory::variable(const void* key, const char* name, size_t bytes, size_t alignment) {
  for (const Part& part : parts_) {
    if (part.key == key) return base_ + part.begin;
  }
  const size_t begin = (next_ + alignment - 1) / alignment * alignment;
  if (begin + bytes + kRedzone > kArenaBytes) return nullptr;
  // "... [with T = Sums; ...]"
  std::string type = name;
  if (const size_t with = type.find("T = "); with != std::string::npos) {
    type = type.substr(with + 4, type.find_first_of(";]", with) - with - 4);
  }
  parts_.push_back({"shared variable of type " + type, begin, bytes, key});
  next_ = begin + bytes + kRedzone;
  static_bytes_ += bytes;
  memset(base_ + begin, kPoison, bytes);
  return base_ + begin;
}

const SharedMemory::Part* SharedMemory::part(size_t offset, size_t bytes) const {
  for (const Part& part : parts_) {
    if (offset >= part.begin && offset + bytes <= part.begin + part.bytes) return &part;
  }
  return nullptr;
}

std::string SharedMemory::describe(size_t offset) const {
  const Part* nearest = &parts_[0];
  for (const Part& part : parts_) {
    if (part.begin <= offset) nearest = &part;
  }
  const auto distance = static_cast<int64_t>(offset) - static_cast<int64_t>(nearest->begin);
  return nearest->name + (distance < 0 ? " - " : " + ") + std::to_string(distance < 0 ? -distance : distance) +
         " (of " + std::to_string(nearest->bytes) + " bytes)";
}

}  // namespace fastgen::emulator
