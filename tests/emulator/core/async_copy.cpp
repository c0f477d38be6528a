// cp.async: asynchronous copies from global to shared memory (PTX ISA, "cp.async").
//
// Until a wait of the issuing thread covers a copy, its target must not be accessed and its source must not change,
// independent of when the bytes are moved.
#include <algorithm>
#include <cstring>

#include "core/engine.h"

namespace fastgen::emulator {

void async_copy(void* target, const void* source, int bytes, int valid, Where where) {
  Engine& engine = Engine::get();
  const auto site = reinterpret_cast<Site>(__builtin_return_address(0));
  if (running->lane == 0) ++engine.counters->async_copies;
  if ((bytes != 4 && bytes != 8 && bytes != 16) || valid < 0 || valid > bytes) {
    engine.fail(kind::kMisuse,
                "async_copy: expected 4, 8 or 16 bytes, none to all of them valid, got " + std::to_string(bytes) +
                    ", of which " + std::to_string(valid),
                where);
  }
  const auto from = reinterpret_cast<uintptr_t>(source);
  if (engine.shared.holds(from)) engine.fail(kind::kMisuse, "async_copy: the source is in shared memory", site);
  // Also of a source of which no byte is read: the PTX ISA makes no exception.
  if (reinterpret_cast<uintptr_t>(target) % bytes != 0 || from % bytes != 0) {
    engine.fail(kind::kMisaligned,
                "async_copy of " + std::to_string(bytes) + " bytes: source and target must be multiples of that", site);
  }
  const size_t offset = engine.shared_offset(target, bytes, "async_copy", site);
  if (engine.options.checks) {
    if (valid > 0) engine.access(source, valid, Touch::kRead, site, 1);
    engine.access_shared(offset, bytes, Touch::kWrite, site);
    const Stamp on_its_way = Stamp::reference(engine.copies.size());
    for (int i = 0; i < bytes; ++i) engine.shared.cells(offset)[i].write = on_its_way;
    if (engine.options.count_banks) engine.banks.access(running->warp, running->lane, site, offset, bytes);
  }
  const size_t copy = engine.copies.size();
  engine.copies.push_back({running->index, from, offset, bytes, valid, site});
  engine.copies.back().place = engine.flying.size();
  engine.flying.push_back(copy);
  running->open_copies.push_back(copy);
  engine.sources_begin = std::min(engine.sources_begin, from);
  engine.sources_end = std::max(engine.sources_end, from + valid);
  if (engine.landing == Engine::kEarly) engine.land(copy);
}

void Engine::land(size_t index) {
  Copy& copy = copies[index];
  if (copy.landed) return;
  memcpy(shared.at(copy.target), reinterpret_cast<const void*>(copy.source), copy.valid);
  memset(shared.at(copy.target) + copy.valid, 0, copy.bytes - copy.valid);
  copy.landed = true;
}

void Engine::land_some() {
  if (!flying.empty() && chance(4)) land(flying[random_() % flying.size()]);
  if (!events.empty() && chance(16)) happen(random_() % events.size());
  land_some_tensor_pieces();
  land_some_stored_rows();
  run_some_products();
}

void Engine::forget_copies() {
  copies.clear(), flying.clear();
  sources_begin = UINTPTR_MAX, sources_end = 0;
}

void Engine::make_visible(const std::vector<size_t>& indices, int owner, uint32_t epoch) {
  for (const size_t index : indices) {
    Copy& copy = copies[index];
    if (copy.visible) continue;
    land(index);
    copy.visible = true;
    copies[flying.back()].place = copy.place;
    flying[copy.place] = flying.back();
    flying.pop_back();
    if (!options.checks) continue;
    const Stamp written =
        Stamp::make(owner, copy.arrival != 0 ? copy.arrival : epoch, block_number, site_number(copy.site));
    for (int i = 0; i < copy.bytes; ++i) {
      Cell& cell = shared.cells(copy.target)[i];
      if (cell.write == Stamp::reference(index)) cell = {written, {}};
    }
  }
  if (flying.empty()) sources_begin = UINTPTR_MAX, sources_end = 0;
}

void Engine::check_source_not_in_flight(uintptr_t address, size_t bytes, Site site) {
  check_tensor_not_in_flight(address, bytes, site);
  if (address >= sources_end || address + bytes <= sources_begin) return;
  for (const size_t index : flying) {
    const Copy& copy = copies[index];
    if (address < copy.source + copy.valid && copy.source < address + bytes) {
      fail(kind::kAsyncCopy, "overwrites global memory that a copy is still reading", site,
           "copied by " + name_of(copy.owner) + " at " + source_of(copy.site) + ", with no wait since");
    }
  }
}

void async_copy_commit(Where where) {
  if (Engine::get().left_out("async_copy_commit", where)) return;
  running->groups.push_back(std::move(running->open_copies));
  running->open_copies.clear();
}

void async_copy_wait(int groups_left, Where where) {
  Engine& engine = Engine::get();
  if (engine.left_out("async_copy_wait", where)) return;
  engine.maybe_preempt_at_sync();
  Thread& thread = *running;
  while (static_cast<int>(thread.groups.size()) > std::max(groups_left, 0)) {
    engine.make_visible(thread.groups.front(), thread.index, thread.epoch);
    thread.groups.pop_front();
  }
  if (groups_left < 0) {
    engine.make_visible(thread.open_copies, thread.index, thread.epoch);
    thread.open_copies.clear();
  }
}

void async_copy_arrive(void* mbarrier, Where where) {
  Engine& engine = Engine::get();
  if (engine.left_out("async_copy_arrive", where)) return;
  const auto site = reinterpret_cast<Site>(__builtin_return_address(0));
  engine.maybe_preempt_at_sync();
  engine.mbarrier(mbarrier, "async_copy_arrive", site);
  Thread& thread = *running;
  Event event = {thread.index,       engine.shared.offset(reinterpret_cast<uintptr_t>(mbarrier)),
                 thread.epoch,       thread.knowledge,
                 thread.open_copies, site};
  for (const auto& group : thread.groups) event.copies.insert(event.copies.end(), group.begin(), group.end());
  std::erase_if(event.copies, [&](size_t copy) { return engine.copies[copy].visible; });
  for (const size_t copy : event.copies) {
    if (engine.copies[copy].arrival == 0) engine.copies[copy].arrival = thread.epoch;
  }
  ++thread.epoch;
  engine.events.push_back(std::move(event));
  if (engine.landing == Engine::kEarly) engine.happen(engine.events.size() - 1);
}

void Engine::happen(size_t index) {
  const Event event = std::move(events[index]);
  events.erase(events.begin() + static_cast<std::ptrdiff_t>(index));
  make_visible(event.copies, event.thread, event.epoch);
  const auto entry = mbarriers.find(event.mbarrier);
  if (entry == mbarriers.end()) {
    fail(kind::kMisuse, "async_copy_arrive: the mbarrier was invalidated before the copies were complete", event.site);
  }
  Gathering gathered;
  gathered.add(event.knowledge, thread_count, event.thread, event.epoch);
  arrive(entry->second, gathered, 1, "async_copy_arrive", event.site);
}

}  // namespace fastgen::emulator
