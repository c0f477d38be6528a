// Runs the threads of a block one at a time, in an adversarial order derived from a seed.
#include <algorithm>
#include <bit>
#include <numeric>

#include "core/engine.h"
#include "core/faults.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fastgen::emulator {

thread_local Thread* running = nullptr;

namespace {

// More thread switches than this are reported as a livelock.
constexpr uint64_t kMostSwitches = uint64_t{1} << 27;
// From here on the order is fair, so that a polling thread and the one that it waits for both make progress.
constexpr uint64_t kSwitchesUntilFair = 1 << 17;
constexpr uint64_t kMostFutilePolls = 200000;

uint64_t mix(uint64_t a, uint64_t b) {  // splitmix64
  uint64_t x = a + 0x9E3779B97F4A7C15u * (b + 1);
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

int nth_set_bit(uint32_t bits, uint32_t n) {
  for (; n > 0; --n) bits &= bits - 1;
  return std::countr_zero(bits);
}

}  // namespace

Engine& Engine::get() {
  static Engine engine;
  return engine;
}

void run_grid(const char* name, const LaunchRequest& request) {
  const std::lock_guard lock(Engine::get().mutex);
  Engine::get().run_grid(name, request);
}

// Dynamic shared memory begins after the static variables, at a multiple of its alignment (csrc/device/shared.cuh).
static size_t shared_bytes(size_t of_statics, size_t dynamic) {
  constexpr size_t kAlignment = SharedMemory::kAlignment;
  return dynamic == 0 ? of_statics : (of_statics + kAlignment - 1) / kAlignment * kAlignment + dynamic;
}

int launch_bound([[maybe_unused]] const void* kernel) {
#if defined(__x86_64__) && !defined(__clang__)
  const auto* code = static_cast<const unsigned char*>(kernel);
  constexpr unsigned char kNoOperation = 0x90;
  int count = 0;
  for (const unsigned char* at = code - 1; *at == kNoOperation; --at) ++count;
  return count / 32 * 32;  // less the padding between functions; bounds are whole warps
#else
  return 0;
#endif
}

void Engine::check_limits(const char* name, const LaunchRequest& r) {
  const auto refuse = [&](const char* error, const std::string& detail) {
    throw std::runtime_error(std::string(name) + ": " + error + " (" + detail + ")");
  };
  constexpr unsigned kMostX = 2147483647, kMostYZ = 65535, kMostThreads = 1024, kMostDepth = 64;
  const uint64_t block_threads = uint64_t{r.block.x} * r.block.y * r.block.z;
  if (block_threads == 0 || block_threads > kMostThreads || r.block.z > kMostDepth) {
    refuse("invalid configuration argument", "block " + text(r.block) + ", at most 1024 threads, 64 in z");
  }
  if (uint64_t{r.grid.x} * r.grid.y * r.grid.z == 0 || r.grid.x > kMostX || std::max(r.grid.y, r.grid.z) > kMostYZ) {
    refuse("invalid configuration argument", "grid " + text(r.grid) + ", at most (2147483647, 65535, 65535)");
  }
  const size_t of_statics = static_bytes_[r.kernel];
  if (shared_bytes(of_statics, r.shared_bytes) > options.shared_limit) {
    refuse("invalid argument", std::to_string(r.shared_bytes) + " bytes of dynamic shared memory, " +
                                   std::to_string(of_statics) + " static, at most " +
                                   std::to_string(options.shared_limit));
  }
  const int bound = r.kernel == nullptr ? 0 : launch_bound(r.kernel);
  if (bound != 0 && block_threads > static_cast<uint64_t>(bound)) {
    refuse("too many resources requested for launch",
           "block " + text(r.block) + ", __launch_bounds__ has at most " + std::to_string(bound) + " threads");
  }
}

void Engine::note_static_shared(size_t bytes, const Where& where) {
  size_t& known = static_bytes_[request->kernel];
  known = std::max(known, bytes);
  constexpr size_t kMostStatic = 48 * 1024;  // ptxas refuses more
  if (bytes > kMostStatic) fail(kind::kMisuse, "over 48 KiB of static shared memory", where);
  const size_t all = shared_bytes(bytes, request->shared_bytes);
  if (all > options.shared_limit) {
    fail(kind::kMisuse, "static and dynamic shared memory are over the limit of a block", where);
  }
  // csrc/device/launch.cuh opts in to more.
  constexpr size_t kForAll = 48 * 1024, kStaticSharedBytes = 2048;
  if (request->shared_bytes > 0 && request->shared_bytes + kStaticSharedBytes <= kForAll && all > kForAll) {
    fail(kind::kMisuse, "static and dynamic shared memory are over 48 KiB, with no opt-in", where);
  }
}

void Engine::run_grid(const char* name, const LaunchRequest& r) {
  check_limits(name, r);
  request = &r;
  kernel = name;
  ++launch_number, ++launches_ever;
  random_.seed(static_cast<uint32_t>(mix(options.seed, launch_number)));
  gridDim = r.grid, blockDim = r.block;
  thread_count = static_cast<int>(r.block.x * r.block.y * r.block.z);
  warp_count = (thread_count + 31) / 32;
  while (static_cast<int>(threads.size()) < thread_count) threads.push_back(std::make_unique<Thread>());
  std::vector<uint64_t> blocks(uint64_t{r.grid.x} * r.grid.y * r.grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), random_);
  counters = &statistics[kernel];
  ++counters->launches, counters->blocks += blocks.size();
  struct Done {
    Engine& engine;
    ~Done() {
      running = nullptr, engine.request = nullptr;
      engine.readers_.trim(0);
    }
  } done{*this};
  const FaultGuard guard;
  for (const uint64_t block : blocks) run_block(block);
}

void Engine::reset_block() {
  shared.reset(request->shared_bytes);
  constexpr size_t kMostSets = 1 << 20;
  readers_.trim(kMostSets);
  meetings.resize(32);
  for (auto& of_warp : meetings) of_warp.clear();
  for (Barrier& barrier : barriers) barrier = {};
  forget_copies();
  tensor_copies.clear(), tensor_pieces.clear(), stored_rows.clear(), copiers = 0;
  products.assign(warp_count, {});
  warpgroups.assign((warp_count + 3) / 4, {});
  register_shares.assign(warp_count, {launch_registers(warp_count)});
  free_registers = 0;
  mbarriers.clear(), events.clear(), polling.clear(), banks.clear();
  std::fill(std::begin(exited), std::end(exited), 0);
  std::fill(std::begin(ready_), std::end(ready_), 0);
  ready_warps_ = 0, live = thread_count, failed_ = false, switches_ = 0, accesses_ = 0, repeats_ = 0;
  for (int i = 0; i < thread_count; ++i) {
    Thread& thread = *threads[i];
    thread.index = i, thread.warp = i / 32, thread.lane = i % 32;
    const unsigned x = i % blockDim.x, y = i / blockDim.x % blockDim.y, z = i / (blockDim.x * blockDim.y);
    thread.position = dim3(x, y, z);
    thread.knowledge = nullptr, thread.epoch = 1;
    thread.open_copies.clear(), thread.groups.clear(), thread.stores = {}, thread.polled = false;
    thread.in_flight.clear(), thread.fenced = false, ++thread.fences;
    thread.fiber.start([] { get().thread_main(); });
    wake(i);
  }
}

void Engine::choose_strategy() {
  constexpr uint32_t kPreemptions[] = {0, 0, 200, 20};
  constexpr uint32_t kPreemptionsAtSync[] = {0, 1, 2, 8};
  constexpr decltype(order_) kOrders[] = {kRandom, kAscending, kDescending, kOneWarpAhead};
  constexpr decltype(landing) kLandings[] = {kLate, kEarly, kWhenever};
  order_ = kOrders[random_() % 4];
  preempt_one_in_ = kPreemptions[random_() % 4];
  preempt_at_sync_one_in_ = kPreemptionsAtSync[random_() % 4];
  landing = kLandings[random_() % 3];
  std::iota(std::begin(warp_rank_), std::end(warp_rank_), 0);
  std::shuffle(std::begin(warp_rank_), std::end(warp_rank_), random_);
}

void Engine::run_block(uint64_t number) {
  block_number = number;
  blockIdx = dim3(number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y);
  reset_block();
  choose_strategy();
  uint64_t futile_polls = 0;
  while (live > 0) {
    if (ready_warps_ == 0) {
      if (!events.empty()) {
        happen(random_() % events.size());
      } else if (!tensor_pieces.empty()) {
        land_tensor_piece(random_() % tensor_pieces.size());
      } else if (!polling.empty() && ++futile_polls < kMostFutilePolls) {
        wake_pollers(polling);
      } else {
        stuck(false);
      }
      continue;
    }
    if (landing == kWhenever) land_some();
    if (++switches_ == kSwitchesUntilFair) order_ = kRandom;
    if (switches_ % kSwitchesUntilFair == 0) wake_pollers(polling);
    current_index = choose();
    running = threads[current_index].get();
    threadIdx = running->position;
    if (!running->polled) futile_polls = 0;
    Fiber::change(scheduler_, running->fiber);
    running = nullptr;
    if (failed_) throw Finding(failure_);
    if (switches_ > kMostSwitches) stuck(true);
  }
  // Outstanding asynchronous work completes before the block's memory is reused.
  while (!events.empty()) happen(0);
  check_asynchronous_work_is_done();
  finish_stored_rows(-1, 0, true);
  if (options.count_banks) banks.finish(*counters);
}

void Engine::thread_main() {
  request->run(request->call);
  thread_exited();
  Fiber::change(running->fiber, scheduler_);
}

int Engine::choose() {
  int warp = 0;
  switch (order_) {
    case kRandom: warp = nth_set_bit(ready_warps_, random_() % std::popcount(ready_warps_)); break;
    case kAscending: warp = std::countr_zero(ready_warps_); break;
    case kDescending: warp = 31 - std::countl_zero(ready_warps_); break;
    case kOneWarpAhead:
      for (const int candidate : warp_rank_) {
        warp = candidate;
        if ((ready_warps_ >> candidate & 1) != 0) break;
      }
      break;
  }
  const uint32_t lanes = ready_[warp & 31];
  if (order_ == kAscending) return warp * 32 + std::countr_zero(lanes);
  if (order_ == kDescending) return warp * 32 + 31 - std::countl_zero(lanes);
  return warp * 32 + nth_set_bit(lanes, random_() % std::popcount(lanes));
}

void Engine::yield() { Fiber::change(running->fiber, scheduler_); }

void Engine::maybe_preempt(uintptr_t looked_at) {
  if (preempt_one_in_ != 0 && random_() % preempt_one_in_ == 0) return yield();
  // A thread that polls an address yields to the others in a fair order, up to a limit.
  constexpr uint64_t kTurn = 1 << 16, kRepeatsInTurn = 1 << 8, kMostRepeats = 1 << 24;
  if (++accesses_ % kTurn == 0) yield();
  if (looked_at == 0) return;
  if (looked_at != running->last_looked_at) {
    running->last_looked_at = looked_at;
    return;
  }
  if (++repeats_ % kRepeatsInTurn != 0) return;
  order_ = kRandom;
  if (repeats_ >= kMostRepeats) switches_ = kMostSwitches + 1;
  yield();
}

void Engine::maybe_preempt_at_sync() {
  if (chance(preempt_at_sync_one_in_)) yield();
}

void Engine::wake(int thread) {
  threads[thread]->state = Thread::kReady;
  ready_[thread / 32] |= 1u << thread % 32;
  ready_warps_ |= 1u << thread / 32;
}

void Engine::wake_pollers(std::vector<int>& pollers) {
  for (const int thread : pollers) {
    if (threads[thread]->polled) wake(thread);
  }
  pollers.clear();
}

void Engine::wait(const Waiting& waiting) {
  repeats_ = 0;
  running->waiting = waiting;
  running->state = Thread::kWaiting;
  ready_[running->warp] &= ~(1u << running->lane);
  if (ready_[running->warp] == 0) ready_warps_ &= ~(1u << running->warp);
  yield();
}

uint32_t Engine::lanes_of(int warp) const {
  const int lanes = std::min(32, thread_count - warp * 32);
  return lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
}

void Engine::thread_exited() {
  Thread& thread = *running;
  thread.state = Thread::kExited;
  repeats_ = 0;
  const uint32_t bit = 1u << thread.lane;
  exited[thread.warp] |= bit;
  ready_[thread.warp] &= ~bit;
  if (ready_[thread.warp] == 0) ready_warps_ &= ~(1u << thread.warp);
  --live;
  if (barriers[0].arrived > 0 && barriers[0].expected == warp_count * 32) {
    fail(kind::kExited, "the thread returned, but others wait for it in sync_block", barriers[0].first);
  }
  lane_exited(thread.warp, bit);
}

bool Engine::left_out(const char* what, const Where& where) {
  const auto key = std::make_tuple(what, where.file_name(), where.line(), static_cast<const Counters*>(counters));
  const auto [entry, fresh] = calls_.try_emplace(key, false);
  if (fresh) {
    const std::string site =
        std::string(what) + " " + where.file_name() + ":" + std::to_string(where.line()) + " in " + kernel;
    if (std::find(sites_seen.begin(), sites_seen.end(), site) == sites_seen.end()) sites_seen.push_back(site);
    entry->second = site == options.leave_out;
  }
  return entry->second;
}

}  // namespace fastgen::emulator
