#include "core/control.h"

#include "core/engine.h"

namespace fastgen::emulator {

void check_accesses(bool on);  // hooks.cpp

namespace {
thread_local int operators_running = 0;
}  // namespace

void enter_operator() { ++operators_running; }
void leave_operator() { --operators_running; }
bool in_operator() { return operators_running > 0; }

void configure(const Options& options) {
  Engine& engine = Engine::get();
  const std::lock_guard lock(engine.mutex);
  if (options.shared_limit > SharedMemory::kMostBytes) {
    throw std::invalid_argument("shared_limit: expected at most " + std::to_string(SharedMemory::kMostBytes) +
                                " bytes, got " + std::to_string(options.shared_limit));
  }
  engine.options = options;
  engine.launch_number = 0;
  engine.sites_seen.clear();
  engine.forget_calls();
  check_accesses(options.checks);
}

size_t shared_limit() { return Engine::get().options.shared_limit; }

std::vector<std::string> sites() {
  const std::lock_guard lock(Engine::get().mutex);
  return Engine::get().sites_seen;
}

Statistics statistics() {
  const std::lock_guard lock(Engine::get().mutex);
  return Engine::get().statistics;
}

void add_memory(const void* begin, size_t bytes, bool fresh, bool read_only) {
  const std::lock_guard lock(Engine::get().mutex);
  Engine::get().global.add(begin, bytes, fresh, read_only);
}

void remove_memory(const void* begin) {
  const std::lock_guard lock(Engine::get().mutex);
  Engine::get().global.remove(begin);
}

}  // namespace fastgen::emulator
