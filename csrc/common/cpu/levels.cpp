#include "common/cpu/levels.h"

#include <atomic>
#include <cstring>

#include "common/exported.h"

#if FASTGEN_X86_LEVELS
#include <cpuid.h>
#endif

namespace fastgen::cpu {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512"};

Level best_level() {
#if FASTGEN_X86_LEVELS
  __builtin_cpu_init();  // this may run before the constructors of the compiler's library
  // Compilers differ in the names that they check beyond these, so F16C, LZCNT and MOVBE are read from the CPU itself.
  unsigned a = 0, b = 0, c = 0, d = 0, extended = 0;
  const bool known = __get_cpuid(1, &a, &b, &c, &d) && __get_cpuid(0x80000001u, &a, &b, &extended, &d);
  constexpr unsigned kF16c = 1u << 29, kMovbe = 1u << 22, kLzcnt = 1u << 5;
  const bool avx2 = known && (c & kF16c) && (c & kMovbe) && (extended & kLzcnt) && __builtin_cpu_supports("avx2") &&
                    __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("popcnt");
  if (!avx2) return Level::kGeneric;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return avx512 ? Level::kAvx512 : Level::kAvx2;
#else
  return Level::kGeneric;
#endif
}

std::atomic<Level>& level_in_use() {
  static std::atomic<Level> level(best_level());
  return level;
}

}  // namespace

Level current_level() { return level_in_use().load(std::memory_order_relaxed); }

}  // namespace fastgen::cpu

// The best level of this CPU. A CPU has every level before it too.
FASTGEN_EXPORTED const char* fastgen_best_cpu_level() {
  return fastgen::cpu::kNames[static_cast<int>(fastgen::cpu::best_level())];
}

FASTGEN_EXPORTED const char* fastgen_cpu_level() {
  return fastgen::cpu::kNames[static_cast<int>(fastgen::cpu::current_level())];
}

// Uses a level from the next call of a kernel on. Returns 0, and changes nothing, if this CPU does not have it.
FASTGEN_EXPORTED int fastgen_use_cpu_level(const char* name) {
  using namespace fastgen::cpu;
  for (int level = 0; level <= static_cast<int>(best_level()); ++level) {
    if (strcmp(kNames[level], name) != 0) continue;
    level_in_use().store(static_cast<Level>(level), std::memory_order_relaxed);
    return 1;
  }
  return 0;
}
