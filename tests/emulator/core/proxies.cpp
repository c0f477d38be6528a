// Fences between the generic and the asynchronous proxy (PTX ISA, "Memory Consistency Model"; "fence.proxy",
// "fence.mbarrier_init"), and what must be over when a block ends.
#include "core/engine.h"

namespace fastgen::emulator {

void Engine::fence_between_proxies(bool mbarriers_only) {
  Thread& thread = self();
  const size_t section = clock_section();
  auto clock = thread.knowledge == nullptr ? std::vector<uint32_t>() : *thread.knowledge;
  if (clock.size() < 3 * section) clock.resize(3 * section, 0);
  for (size_t first = mbarriers_only ? 2 * section : section; first < 3 * section; first += section) {
    for (int i = 0; i < thread_count; ++i) clock[first + i] = std::max(clock[first + i], clock[i]);
    clock[first + thread.index] = thread.epoch;
  }
  thread.knowledge = std::make_shared<const std::vector<uint32_t>>(std::move(clock));
  ++thread.epoch;  // what it writes from now on comes after the fence
}

// What comes before an access that the thread starts now.
std::vector<uint32_t> Engine::known_to(const Thread& thread) const {
  auto known = thread.knowledge == nullptr ? std::vector<uint32_t>() : *thread.knowledge;
  if (known.size() < clock_section()) known.resize(clock_section(), 0);
  known[thread.index] = thread.epoch;
  return known;
}

// An access of the asynchronous proxy that is started by who knows ``known``.
Before Engine::before_asynchronous(const std::vector<uint32_t>& known) const {
  const size_t section = clock_section();
  Before before = {known.data(), -1, block_number % Stamp::kBlocks, std::min(known.size(), section)};
  before.asynchronous = true, before.threads = thread_count;
  before.fenced = known.size() >= 2 * section ? known.data() + section : nullptr;
  return before;
}

// The same to global memory: the fences of csrc/device/fence.cuh are for shared memory.
Before Engine::before_asynchronous_global(const std::vector<uint32_t>& known) const {
  Before before = before_asynchronous(known);
  before.fenced = nullptr;
  return before;
}

void fence_async_proxy(Where where) {
  Engine& engine = Engine::get();
  if (engine.left_out("fence_async_proxy", where)) return;
  engine.maybe_preempt_at_sync();
  engine.fence_between_proxies(false);
}

void fence_mbarrier_init(Where where) {
  Engine& engine = Engine::get();
  if (engine.left_out("fence_mbarrier_init", where)) return;
  engine.maybe_preempt_at_sync();
  engine.fence_between_proxies(true);
}

void Engine::check_asynchronous_work_is_done() {
  check_tensor_stores_are_read();
  if (!tensor_pieces.empty()) {
    const TensorCopy& copy = tensor_copies[tensor_pieces.front().copy];
    fail(kind::kAsyncCopy, "the block ends while a tensor copy is still writing its shared memory", copy.site);
  }
  for (int warp = 0; warp < warp_count; ++warp) {
    const WarpProducts& mine = products[warp];
    const std::string name = "warp " + std::to_string(warp);
    if (mine.open || mine.finished < mine.groups) {
      fail(kind::kProduct, name + " returns with no wait for its matrix products", mine.last);
    }
    if (mine.started != products[warp / 4 * 4].started) {
      fail(kind::kDivergence,
           name + " has started " + std::to_string(mine.started) + " products, the first warp of its warpgroup " +
               std::to_string(products[warp / 4 * 4].started),
           mine.last);
    }
    if (register_shares[warp].registers != register_shares[warp / 4 * 4].registers) {
      fail(kind::kDivergence, name + " has another number of registers than its warpgroup", Site{0});
    }
  }
}

}  // namespace fastgen::emulator
