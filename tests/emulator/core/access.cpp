// Checks of memory accesses: bounds, initialization, and ordering by barriers.
#include <link.h>

#include <cstdio>
#include <cstring>

#include "core/engine.h"

namespace fastgen::emulator {

namespace {

const char* verb(Touch touch) {
  switch (touch) {
    case Touch::kRead: return "reads";
    case Touch::kWrite: return "writes";
    case Touch::kAtomic: return "updates";
  }
  return "";
}

std::string hex(uintptr_t value) {
  char buffer[32];
  snprintf(buffer, sizeof(buffer), "0x%zx", static_cast<size_t>(value));
  return buffer;
}

// In a segment of the program or its libraries that is read-only, such as a table of constants.
bool is_constant(uintptr_t begin, size_t bytes) {
  struct Range {
    uintptr_t begin, end;
    bool found;
  } range = {begin, begin + bytes, false};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* given) {
        Range& range = *static_cast<Range*>(given);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          if (segment.p_type != PT_LOAD || (segment.p_flags & PF_W) != 0) continue;
          const uintptr_t first = info->dlpi_addr + segment.p_vaddr;
          range.found = range.found || (range.begin >= first && range.end <= first + segment.p_memsz);
        }
        return range.found ? 1 : 0;
      },
      &range);
  return range.found;
}

std::string bytes_at(size_t bytes, const std::string& where) { return std::to_string(bytes) + " bytes at " + where; }

}  // namespace

uint32_t Engine::site_number(Site site) {
  if (site != last_site_) {
    last_site_ = site;
    const auto [entry, fresh] = site_numbers_.try_emplace(site, static_cast<uint32_t>(sites_.size()));
    if (fresh) sites_.push_back(site);
    last_site_number_ = entry->second;
  }
  return last_site_number_;
}

Stamp Engine::stamp(Site site) {
  const Thread& thread = self();
  if (thread.epoch >= Stamp::kEpochs - 1) fail(kind::kDeadlock, "over a million barriers in one block", site);
  return Stamp::make(thread.index, thread.epoch, block_number, site_number(site));
}

Before Engine::before() const {
  const Thread& thread = *threads[current_index];
  const bool none = thread.knowledge == nullptr;
  return {none ? nullptr : thread.knowledge->data(), thread.index, block_number % Stamp::kBlocks,
          none ? 0 : thread.knowledge->size()};
}

std::string Engine::accessed_by(Stamp stamp) const {
  const std::string place = stamp.site() < sites_.size() ? source_of(sites_[stamp.site()]) : "an unknown place";
  if (stamp.block() != block_number % Stamp::kBlocks) {
    const uint64_t block = stamp.block();
    const dim3 at(block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y);
    return name_of(stamp.thread()) + " of block " + text(at) + " at " + place;
  }
  return name_of(stamp.thread()) + " at " + place;
}

size_t Engine::shared_offset(const void* address, size_t bytes, const char* what, Site site) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  if (!shared.holds(begin)) {
    fail(kind::kOutOfBounds, std::string(what) + ": address " + hex(begin) + " is not in shared memory", site);
  }
  const size_t offset = shared.offset(begin);
  if (shared.part(offset, bytes) == nullptr) {
    fail(kind::kOutOfBounds, std::string(what) + " touches " + bytes_at(bytes, shared.describe(offset)), site);
  }
  return offset;
}

void Engine::access_shared(size_t offset, size_t bytes, Touch touch, Site site) {
  if (!options.checks) return;
  access_shared(offset, bytes, touch, stamp(site), before(), site);
}

void Engine::access_shared(size_t offset, size_t bytes, Touch touch, Stamp now, const Before& ordered, Site site) {
  const Conflict conflict = touch_cells(shared.cells(offset), bytes, touch, now, readers_, ordered);
  if (conflict.kind == Conflict::kNone) return;
  const std::string what =
      std::string(verb(touch)) + " " + bytes_at(bytes, shared.describe(offset)) +
      (conflict.offset > 0 ? ", of which byte " + std::to_string(conflict.offset) + " is the first at fault" : "");
  switch (conflict.kind) {
    case Conflict::kUnwritten: fail(kind::kUnwritten, what, site);
    case Conflict::kInFlight: {
      if ((conflict.other.index() & kTensorCopyMark) != 0) {
        const TensorCopy& copy = tensor_copies[conflict.other.index() & ~kTensorCopyMark];
        fail(kind::kAsyncCopy, what + ", which a tensor copy is still writing", site,
             "started by " + name_of(copy.owner) + " at " + source_of(copy.site) + ", with no wait since");
      }
      if (conflict.other.index() >= copies.size()) {
        fail(kind::kMisuse, what + ", where an mbarrier lies", site);
      }
      const Copy& copy = copies[conflict.other.index()];
      fail(kind::kAsyncCopy, what + ", which a copy is still writing", site,
           "copied by " + name_of(copy.owner) + " at " + source_of(copy.site) + ", with no wait since");
    }
    case Conflict::kUnfenced:
      fail(kind::kProxy, what + " by the asynchronous proxy", site,
           "written by " + accessed_by(conflict.other) + ", with no fence_async_proxy between");
    default:
      if (conflict.other_wrote && conflict.other.thread() >= thread_count + warp_count) {  // it has landed, by chance
        fail(kind::kAsyncCopy, what + ", which a tensor copy writes", site,
             "started at " + source_of(sites_[conflict.other.site()]) + ", with no wait for its mbarrier since");
      }
      if (!conflict.other_wrote && conflict.other.thread() >= thread_count + warp_count) {
        fail(kind::kAsyncCopy, what + ", which a tensor store reads", site,
             "started at " + source_of(sites_[conflict.other.site()]) + ", with no tensor_store_wait_read since");
      }
      fail(kind::kRace, what, site,
           std::string(conflict.other_wrote ? "written" : "read") + " by " + accessed_by(conflict.other) +
               ", with no barrier between");
  }
}

void Engine::access(const void* address, size_t bytes, Touch touch, Site site, size_t alignment) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  if (begin % alignment != 0) {
    const std::string at = shared.holds(begin) ? shared.describe(shared.offset(begin)) : hex(begin);
    fail(kind::kMisaligned, std::string(verb(touch)) + " " + bytes_at(bytes, at), site);
  }
  if (shared.holds(begin)) {
    maybe_preempt(touch == Touch::kWrite ? 0 : begin);
    const size_t offset = shared.offset(begin);
    if (shared.part(offset, bytes) == nullptr) {
      fail(kind::kOutOfBounds, std::string(verb(touch)) + " " + bytes_at(bytes, shared.describe(offset)), site);
    }
    access_shared(offset, bytes, touch, site);
    if (options.count_banks) banks.access(running->warp, running->lane, site, offset, bytes);
    return;
  }
  // The arguments of the launch, and the thread's coordinates.
  const auto inside = [&](const void* from, size_t size) { return begin - reinterpret_cast<uintptr_t>(from) < size; };
  if (touch == Touch::kRead &&
      (inside(request->call, request->call_bytes) || inside(&threadIdx, sizeof(dim3)) ||
       inside(&blockIdx, sizeof(dim3)) || inside(&blockDim, sizeof(dim3)) || inside(&gridDim, sizeof(dim3)))) {
    return;
  }
  maybe_preempt(touch == Touch::kWrite ? 0 : begin);
  access_global(begin, bytes, touch, stamp(site), before(), site);
}

void Engine::access_global(uintptr_t begin, size_t bytes, Touch touch, Stamp now, const Before& ordered, Site site) {
  Allocation* allocation = global.find(begin);
  if (allocation == nullptr || begin + bytes > allocation->begin + allocation->bytes) {
    if (touch == Touch::kRead && is_constant(begin, bytes)) return;
    std::string nearest = ", in no memory the kernel was given";
    constexpr size_t kNear = 4096;
    if (allocation != nullptr && begin - allocation->begin < allocation->bytes + kNear) {
      const size_t offset = begin - allocation->begin, size = allocation->bytes;
      nearest = offset < size ? ", of which the last lie beyond the end of an allocation of " + std::to_string(size)
                              : ", " + std::to_string(offset - size) + " bytes behind the end of an allocation of " +
                                    std::to_string(size);
    }
    for (int i = 0; i < thread_count; ++i) {
      if (begin - threads[i]->fiber.stack_begin() < Fiber::kStackBytes) {
        nearest = ", a local variable of " + name_of(i);
      }
    }
    fail(kind::kOutOfBounds, std::string(verb(touch)) + " " + bytes_at(bytes, hex(begin)) + nearest, site);
  }
  const size_t offset = begin - allocation->begin;
  const auto what_memory = [&] {
    return hex(begin) + ", " + std::to_string(offset) + " bytes into an allocation of " +
           std::to_string(allocation->bytes);
  };
  if (allocation->read_only && touch != Touch::kRead) {
    fail(kind::kMisuse, std::string(verb(touch)) + " an operand that is to be read only, at " + what_memory(), site);
  }
  if (touch != Touch::kRead) check_source_not_in_flight(begin, bytes, site);
  for (size_t done = 0; done < bytes;) {
    const size_t in_page = Allocation::kPageBytes - (offset + done) % Allocation::kPageBytes;
    const size_t count = std::min(bytes - done, in_page);
    Cell* cells = global.cells(*allocation, offset + done, launches_ever);
    Conflict conflict = touch_cells(cells, count, touch, now, readers_, ordered);
    if (conflict.kind == Conflict::kUnwritten) {
      // A host operator may have filled it: then the poison is gone.
      const unsigned char* bytes_there = reinterpret_cast<const unsigned char*>(begin + done);
      if (bytes_there[conflict.offset] != kPoison) {
        cells[conflict.offset].write = Stamp::before_launch();
        continue;
      }
      fail(kind::kUnwritten, std::string(verb(touch)) + " " + bytes_at(bytes, what_memory()), site);
    }
    if (conflict.kind == Conflict::kUnfenced) {
      fail(kind::kProxy, std::string(verb(touch)) + " " + bytes_at(bytes, what_memory()) + " by the asynchronous proxy",
           site,
           "written by " + accessed_by(conflict.other) + " in the same launch; fence_async_proxy is for shared memory");
    }
    if (conflict.kind == Conflict::kRace) {
      const bool copied = conflict.other.thread() >= thread_count + warp_count;
      if (copied && conflict.other.block() == block_number % Stamp::kBlocks) {
        fail(kind::kAsyncCopy,
             std::string(verb(touch)) + " " + bytes_at(bytes, what_memory()) + ", which a tensor store writes", site,
             "started at " + source_of(sites_[conflict.other.site()]) + ", with no tensor_store_wait since");
      }
      fail(kind::kRace, std::string(verb(touch)) + " " + bytes_at(bytes, what_memory()), site,
           std::string(conflict.other_wrote ? "written" : "read") + " by " + accessed_by(conflict.other) +
               ", with no barrier between");
    }
    done += count;
  }
}

void load(void* registers, const void* address, size_t bytes) {
  Engine& engine = Engine::get();
  const auto site = reinterpret_cast<Site>(__builtin_return_address(0));
  if (running != nullptr && engine.options.checks) engine.access(address, bytes, Touch::kRead, site, bytes);
  memcpy(registers, address, bytes);
}

void store(void* address, const void* registers, size_t bytes) {
  Engine& engine = Engine::get();
  const auto site = reinterpret_cast<Site>(__builtin_return_address(0));
  if (running != nullptr && engine.options.checks) {
    for (size_t i = 0; i + sizeof(uint32_t) <= bytes; i += sizeof(uint32_t)) {
      uint32_t bits;
      memcpy(&bits, static_cast<const char*>(registers) + i, sizeof(bits));
      engine.check_register(bits, "the stored vector", site);
    }
    engine.access(address, bytes, Touch::kWrite, site, bytes);
  }
  memcpy(address, registers, bytes);
}

void atomic(void* address, size_t bytes, const void* operand, void* old, void (*update)(void*, const void*)) {
  Engine& engine = Engine::get();
  const auto site = reinterpret_cast<Site>(__builtin_return_address(0));
  ++engine.counters->atomics;
  engine.maybe_preempt_at_sync();
  if (engine.options.checks) {
    engine.access(address, bytes, Touch::kAtomic, site, bytes);
  } else {
    engine.maybe_preempt(reinterpret_cast<uintptr_t>(address));
  }
  memcpy(old, address, bytes);
  Thread* const thread = running;
  running = nullptr;  // the update is the kernel's code, with its hooks, but was checked already
  update(address, operand);
  running = thread;
}

void* dynamic_shared() { return Engine::get().shared.dynamic(); }

void* shared_variable(const void* key, const char* name, size_t bytes, size_t alignment, Where where) {
  Engine& engine = Engine::get();
  void* variable = engine.shared.variable(key, name, bytes, alignment);
  if (variable == nullptr) engine.fail(kind::kMisuse, "over 48 KiB of static shared memory", where);
  engine.note_static_shared(engine.shared.static_bytes(), where);
  return variable;
}

}  // namespace fastgen::emulator
