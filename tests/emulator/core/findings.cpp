// Reports of findings: thread, source line, and the seed that replays it.
#include <map>

#include "core/engine.h"

namespace fastgen::emulator {

std::string text(const dim3& at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

std::string ranges(const std::vector<int>& numbers) {
  std::string text = numbers.size() == 1 ? "thread " : "threads ";
  for (size_t i = 0; i < numbers.size();) {
    size_t last = i;
    while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
    text += (i == 0 ? "" : ", ") + std::to_string(numbers[i]);
    if (last > i) text += "-" + std::to_string(numbers[last]);
    i = last + 1;
  }
  return text;
}

std::string Engine::name_of(int thread) const {
  if (thread >= thread_count + warp_count) return "a tensor copy";
  if (thread >= thread_count) return "a matrix product of warp " + std::to_string(thread - thread_count);
  return "thread " + std::to_string(thread) + " (warp " + std::to_string(thread / 32) + ", lane " +
         std::to_string(thread % 32) + ")";
}

void Engine::abandon(const std::string& report) {
  if (running == nullptr) throw Finding(report);
  // The threads' stacks are left as they are: nothing on them owns anything.
  failure_ = report, failed_ = true;
  for (;;) Fiber::change(running->fiber, scheduler_);
}

std::string Engine::header(const char* kind, const std::string& what) const {
  return std::string("emulator: ") + kind + "\n  " + what + "\n  kernel " + kernel + ", block " + text(blockIdx);
}

void Engine::fail(const char* kind, const std::string& what, Site site, const std::string& more) {
  fail_at(kind, what, source_of(site), more);
}

void Engine::fail(const char* kind, const std::string& what, const Where& where, const std::string& more) {
  fail_at(kind, what, source_of(where), more);
}

void Engine::fail_at(const char* kind, const std::string& what, const std::string& place, const std::string& more) {
  std::string report = header(kind, what);
  if (running != nullptr) report += ", " + name_of(current_index);
  report += "\n  at " + place;
  if (!more.empty()) report += "\n  " + more;
  abandon(report + replay_hint());
}

std::string Engine::replay_hint() const {
  return "\n  seed " + std::to_string(options.seed) + ", launch " + std::to_string(launch_number) +
         ": FASTGEN_EMULATOR_SEED=" + std::to_string(options.seed) + " replays it";
}

const std::string& Engine::place_of(Site site) {
  const auto [entry, fresh] = places_.try_emplace(site);
  if (fresh) entry->second = source_of(site);
  return entry->second;
}

std::string Engine::place_of(const Waiting& waiting) {
  return waiting.site != 0 ? place_of(waiting.site) : source_of(waiting.where);
}

// No thread can run, or all of them spin (busy): reports where every thread waits.
void Engine::stuck(bool busy) {
  std::map<std::pair<std::string, std::string>, std::vector<int>> places;
  bool diverged = false, at_barrier = false;
  int gone = 0;
  std::vector<int> running_on;
  for (int i = 0; i < thread_count; ++i) {
    const Thread& thread = *threads[i];
    if (thread.state == Thread::kExited) ++gone;
    if (thread.state == Thread::kReady) running_on.push_back(i);
    if (thread.state != Thread::kWaiting) continue;
    const Waiting& waiting = thread.waiting;
    places[{waiting.what, place_of(waiting)}].push_back(i);
    at_barrier = at_barrier || waiting.what.starts_with("barrier");
    for (int other = thread.warp * 32; other < i; ++other) {
      const Waiting& others = threads[other]->waiting;
      const bool differs = others.what != waiting.what || others.where.line() != waiting.where.line();
      const bool together = others.of_warp || waiting.of_warp;
      diverged = diverged || (threads[other]->state == Thread::kWaiting && differs && together);
    }
  }
  // Lanes of one warp that meet in different instructions, or in one with different operands.
  for (const auto& of_warp : meetings) diverged = diverged || of_warp.size() > 1;
  const char* kind = busy                     ? kind::kDeadlock
                     : gone > 0 && at_barrier ? kind::kExited
                     : diverged               ? kind::kDivergence
                                              : kind::kDeadlock;
  std::string report = header(kind, busy ? "the threads take turns without end" : "no thread can go on");
  for (const auto& [place, waiting] : places) {
    report += "\n  " + ranges(waiting) + (waiting.size() == 1 ? " waits" : " wait") + " in " + place.first + " at " +
              place.second;
  }
  if (!running_on.empty()) report += "\n  " + ranges(running_on) + (running_on.size() == 1 ? " loops" : " loop");
  if (gone > 0) report += "\n  " + std::to_string(gone) + (gone == 1 ? " thread has" : " threads have") + " returned";
  throw Finding(report + replay_hint());
}

}  // namespace fastgen::emulator
