// Barriers of a block: bar.sync and bar.arrive (PTX ISA, "bar, barrier"), and mbarrier objects (PTX ISA, "mbarrier").
#include <algorithm>

#include "core/engine.h"

namespace fastgen::emulator {

void Engine::release(Gathering& into) {
  Thread& thread = self();
  into.add(thread.knowledge, thread_count, thread.index, thread.epoch);
  ++thread.epoch;
}

void Engine::acquire(const Gathering& from) {
  if (from.empty()) return;
  Thread& thread = self();
  Gathering both;
  both.add(thread.knowledge, thread_count, thread.index, 0);
  both.add(from);
  thread.knowledge = both.share();
}

// ".aligned": all threads of a warp execute the same instruction.
void Engine::check_alignment_of_warp(const char* what, const Where& where, Site site) {
  const Thread& thread = self();
  for (int other = thread.warp * 32; other < std::min(thread_count, thread.warp * 32 + 32); ++other) {
    const Thread& neighbor = *threads[other];
    if (other == thread.index || neighbor.state != Thread::kWaiting || !neighbor.waiting.aligned) continue;
    const Waiting& waiting = neighbor.waiting;
    // One that waits in this very call was compared with the others.
    if (waiting.what == what && waiting.site == site && site != 0) return;
    if (waiting.what != what || !same_place(waiting.where, waiting.site, where, site)) {
      fail(kind::kDivergence, std::string("threads of one warp are in different instructions: ") + what, site,
           name_of(other) + " is in " + waiting.what + " at " + source_of(waiting.site));
    }
  }
}

namespace {

// What the lanes of a warp bring to a barrier of the block.
struct BarrierLane {
  Thread* thread;
  int id, threads;
  bool waits;
  Where where;
  uint64_t phase;  // the barrier's when the warp arrived
};

std::string name_of(const BarrierLane& lane) {
  return "barrier " + std::to_string(lane.id) + " of " + std::to_string(lane.threads) + " threads";
}

// The warp arrives, as so many threads as a warp has.
void run_arrival(Meeting& meeting) {
  Engine& engine = Engine::get();
  auto* first = static_cast<BarrierLane*>(meeting.lanes[0]);
  const int warp = first->thread->warp;
  Barrier& barrier = engine.barriers[first->id];
  if (barrier.arrived == 0) {
    barrier.expected = first->threads, barrier.first = first->where;
  } else if (barrier.expected != first->threads) {
    engine.fail(kind::kMisuse, name_of(*first) + " is in use with " + std::to_string(barrier.expected) + " threads",
                first->where, "first at " + source_of(barrier.first));
  }
  if ((barrier.participants >> warp & 1) != 0) {
    engine.fail(kind::kMisuse, "the warp arrives twice in one phase of " + name_of(*first), first->where);
  }
  barrier.participants |= 1u << warp;
  barrier.arrived += 32;
  for (void* each : meeting.lanes) {
    if (each == nullptr) continue;
    auto* lane = static_cast<BarrierLane*>(each);
    Thread& thread = *lane->thread;
    lane->phase = barrier.phase;
    barrier.gathered.add(thread.knowledge, engine.thread_count, thread.index, thread.epoch++);
    if (lane->waits) barrier.waiting.push_back(thread.index);
  }
  if (barrier.arrived < barrier.expected) return;
  const Knowledge all = barrier.gathered.share();
  for (const int waiting : barrier.waiting) {
    engine.threads[waiting]->knowledge = all;
    engine.wake(waiting);
  }
  const uint64_t next = barrier.phase + 1;
  barrier = {};
  barrier.phase = next;
}

constexpr WarpInstruction kSyncBlock = {"sync_block", true, true, run_arrival};
constexpr WarpInstruction kSyncNamed = {"sync_named", true, true, run_arrival};
constexpr WarpInstruction kArriveNamed = {"arrive_named", true, true, run_arrival};

void arrive_at(const WarpInstruction& instruction, int id, int threads, const Where& where, void* caller) {
  Engine& engine = Engine::get();
  const auto site = reinterpret_cast<Site>(caller);
  BarrierLane mine = {running, id, threads, &instruction != &kArriveNamed, where, 0};
  const uint64_t operands = static_cast<uint64_t>(id) << 32 | static_cast<uint64_t>(threads);
  engine.meet(instruction, operands, engine.lanes_of(running->warp), &mine, where, site);
  while (mine.waits && engine.barriers[id].phase == mine.phase) engine.wait({name_of(mine), where, true, false, site});
}

void check_named(int id, int threads, const char* what, const Where& where) {
  Engine& engine = Engine::get();
  constexpr int kBarriers = 16;
  const int most = engine.warp_count * 32;
  if (id < 0 || id >= kBarriers || threads <= 0 || threads % 32 != 0 || threads > most) {
    engine.fail(kind::kMisuse,
                std::string(what) + ": expected a barrier from 0 to 15 and a multiple of 32 threads up to " +
                    std::to_string(most) + ", got barrier " + std::to_string(id) + " of " + std::to_string(threads),
                where);
  }
}

}  // namespace

void sync_block(Where where) {
  Engine& engine = Engine::get();
  if (engine.left_out("sync_block", where)) return;
  for (int warp = 0; warp < engine.warp_count; ++warp) {
    if (engine.exited[warp] == 0) continue;
    const int gone = warp * 32 + __builtin_ctz(engine.exited[warp]);
    engine.fail(kind::kExited, "sync_block waits for the whole block, but " + engine.name_of(gone) + " has returned",
                where);
  }
  if (running->index == 0) ++engine.counters->block_barriers;
  arrive_at(kSyncBlock, 0, engine.warp_count * 32, where, __builtin_return_address(0));
}

void sync_named(int id, int threads, Where where) {
  Engine& engine = Engine::get();
  if (engine.left_out("sync_named", where)) return;
  check_named(id, threads, "sync_named", where);
  if (running->lane == 0) ++engine.counters->block_barriers;
  arrive_at(kSyncNamed, id, threads, where, __builtin_return_address(0));
}

void arrive_named(int id, int threads, Where where) {
  Engine& engine = Engine::get();
  if (engine.left_out("arrive_named", where)) return;
  check_named(id, threads, "arrive_named", where);
  arrive_at(kArriveNamed, id, threads, where, __builtin_return_address(0));
}

// --------------------------------------------------------------------------------------------------
// mbarrier

namespace {

constexpr size_t kMbarrierBytes = 8;
constexpr int kMostArrivals = (1 << 20) - 1;
constexpr uint64_t kMbarrierMark = uint64_t{1} << 60;  // in the cells of an mbarrier: not an index of a copy

Site caller(void* address) { return reinterpret_cast<Site>(address); }

}  // namespace

size_t Engine::mbarrier_offset(const void* address, const char* what, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % kMbarrierBytes != 0) {
    fail(kind::kMisaligned, std::string(what) + ": an mbarrier lies at a multiple of 8 bytes", site);
  }
  return shared_offset(address, kMbarrierBytes, what, site);
}

Mbarrier& Engine::mbarrier(const void* address, const char* what, Site site) {
  const size_t offset = mbarrier_offset(address, what, site);
  const auto entry = mbarriers.find(offset);
  if (entry == mbarriers.end()) {
    fail(kind::kUnwritten, std::string(what) + ": no mbarrier was initialized at " + shared.describe(offset), site);
  }
  if (!before()(entry->second.initialized)) {
    fail(kind::kRace, std::string(what) + ": the initialization of the mbarrier at " + shared.describe(offset), site,
         "by " + accessed_by(entry->second.initialized) + " is not ordered before by a barrier");
  }
  return entry->second;
}

void Engine::complete_if_done(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.expected;
  if (!barrier.current.empty()) barrier.completed.add(barrier.current);
  barrier.current.clear();
  for (const int thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
  wake_pollers(barrier.polling);
}

void Engine::arrive(Mbarrier& barrier, const Gathering& gathered, int count, const char* what, Site site) {
  if (barrier.pending < count) {
    fail(kind::kMisuse,
         std::string(what) + ": more arrivals than the " + std::to_string(barrier.expected) +
             " that the mbarrier expects in a phase",
         site);
  }
  barrier.current.add(gathered);
  barrier.pending -= count;
  complete_if_done(barrier);
}

void mbarrier_init(void* address, int count, Where where) {
  Engine& engine = Engine::get();
  const Site site = caller(__builtin_return_address(0));
  if (engine.left_out("mbarrier_init", where)) return;
  const size_t offset = engine.mbarrier_offset(address, "mbarrier_init", site);
  if (count < 1 || count > kMostArrivals) {
    engine.fail(kind::kMisuse, "mbarrier_init: expected 1 to 2^20 - 1 arrivals, got " + std::to_string(count), site);
  }
  if (engine.mbarriers.contains(offset)) {
    engine.fail(kind::kMisuse, "mbarrier_init: there is an mbarrier already; invalidate it first", site);
  }
  engine.access_shared(offset, kMbarrierBytes, Touch::kWrite, site);
  for (size_t i = 0; i < kMbarrierBytes; ++i) engine.shared.cells(offset)[i] = {Stamp::reference(kMbarrierMark), {}};
  Mbarrier& barrier = engine.mbarriers[offset];
  barrier.initialized = engine.stamp(site);
  barrier.expected = barrier.pending = count;
}

void mbarrier_invalidate(void* address, Where where) {
  Engine& engine = Engine::get();
  const Site site = caller(__builtin_return_address(0));
  if (engine.left_out("mbarrier_invalidate", where)) return;
  engine.mbarrier(address, "mbarrier_invalidate", site);
  const size_t offset = engine.shared.offset(reinterpret_cast<uintptr_t>(address));
  engine.mbarriers.erase(offset);
  for (size_t i = 0; i < kMbarrierBytes; ++i) engine.shared.cells(offset)[i] = {engine.stamp(site), {}};
}

void mbarrier_expect(void* address, int64_t bytes, Where where) {
  Engine& engine = Engine::get();
  if (engine.left_out("mbarrier_expect", where)) return;
  engine.maybe_preempt_at_sync();
  engine.mbarrier(address, "mbarrier_expect", caller(__builtin_return_address(0))).bytes += bytes;
}

void mbarrier_complete(void* address, int64_t bytes, Where where) {
  Engine& engine = Engine::get();
  if (engine.left_out("mbarrier_complete", where)) return;
  engine.maybe_preempt_at_sync();
  Mbarrier& barrier = engine.mbarrier(address, "mbarrier_complete", caller(__builtin_return_address(0)));
  barrier.bytes -= bytes;
  engine.complete_if_done(barrier);
}

void mbarrier_arrive(void* address, int64_t expected_bytes, Where where) {
  Engine& engine = Engine::get();
  const Site site = caller(__builtin_return_address(0));
  if (engine.left_out("mbarrier_arrive", where)) return;
  engine.maybe_preempt_at_sync();
  Mbarrier& barrier = engine.mbarrier(address, "mbarrier_arrive", site);
  barrier.bytes += expected_bytes;
  Gathering mine;
  engine.release(mine);
  engine.arrive(barrier, mine, 1, "mbarrier_arrive", site);
}

// The phase with this parity has completed: it is the one before the current phase.
bool mbarrier_test(const void* address, int parity, Where where) {
  Engine& engine = Engine::get();
  if (engine.left_out("mbarrier_test", where)) return true;
  engine.maybe_preempt_at_sync();
  Mbarrier& barrier = engine.mbarrier(address, "mbarrier_test", caller(__builtin_return_address(0)));
  running->polled = static_cast<int>(barrier.phase & 1) == (parity & 1);
  if (!running->polled) {
    engine.acquire(barrier.completed);
    return true;
  }
  // Asking again right away gives the same answer: others go first.
  engine.polling.push_back(running->index);
  barrier.polling.push_back(running->index);
  engine.wait({"mbarrier_test", where});
  running->polled = false;
  return false;
}

void mbarrier_wait(const void* address, int parity, Where where) {
  Engine& engine = Engine::get();
  if (engine.left_out("mbarrier_wait", where)) return;
  engine.maybe_preempt_at_sync();
  for (;;) {
    Mbarrier& barrier = engine.mbarrier(address, "mbarrier_wait", caller(__builtin_return_address(0)));
    if (static_cast<int>(barrier.phase & 1) != (parity & 1)) return engine.acquire(barrier.completed);
    barrier.waiting.push_back(running->index);
    engine.wait({"mbarrier_wait for parity " + std::to_string(parity & 1), where});
  }
}

}  // namespace fastgen::emulator
