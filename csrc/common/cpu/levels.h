// Instruction set levels of the CPU kernels: a function is compiled for each, and the level in use picks one at run
// time.
//
//   template <int kWidth> FASTGEN_HOST_DEVICE void run_task(const Params& p, int64_t item);   // always inlined
//   for_level<run_task<4>, run_task<8>, run_task<16>>()(p, item);
//   for_level<run_rows>()(p, begin, end);                                                     // the same code for all
//
// The level is the best that the CPU has, or what FASTGEN_CPU names (fastgen/backend/cpu_levels.py).
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTGEN_X86_LEVELS 1
#if !defined(__clang__) && __GNUC__ >= 12
#define FASTGEN_TARGET_AVX2 __attribute__((target("arch=x86-64-v3")))
#define FASTGEN_TARGET_AVX512 __attribute__((target("arch=x86-64-v4")))
#else  // the same features, for compilers that do not know these names
#define FASTGEN_TARGET_AVX2 __attribute__((target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,movbe")))
#define FASTGEN_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,movbe")))
#endif
#else
#define FASTGEN_X86_LEVELS 0
#endif

namespace fastgen::cpu {

// kGeneric: what every CPU of the architecture has, SSE2 on x86-64 and NEON on aarch64.
enum class Level { kGeneric, kAvx2, kAvx512 };

Level current_level();

// Vector registers of the generic level, of 4 floats each.
#if defined(__aarch64__)
constexpr int kGenericRegisters = 32;
#else
constexpr int kGenericRegisters = 16;
#endif

// A function for each level; without levels, on other architectures, generic.
template <typename Function>
Function* pick(Function* generic, [[maybe_unused]] Function* avx2, [[maybe_unused]] Function* avx512) {
#if FASTGEN_X86_LEVELS
  const Level level = current_level();
  if (level == Level::kAvx512) return avx512;
  if (level == Level::kAvx2) return avx2;
#endif
  return generic;
}

// kBody, an always inlined function, compiled for each level.
template <auto kBody>
struct Compiled;

template <typename Result, typename... Args, Result (*kBody)(Args...)>
struct Compiled<kBody> {
  static Result generic(Args... args) { return kBody(args...); }
#if FASTGEN_X86_LEVELS
  FASTGEN_TARGET_AVX2 static Result avx2(Args... args) { return kBody(args...); }
  FASTGEN_TARGET_AVX512 static Result avx512(Args... args) { return kBody(args...); }
#endif
};

// The function of the level in use. The bodies may differ in their template arguments, such as the vector width.
template <auto kGeneric, auto kAvx2 = kGeneric, auto kAvx512 = kAvx2>
auto for_level() {
#if FASTGEN_X86_LEVELS
  return pick(Compiled<kGeneric>::generic, Compiled<kAvx2>::avx2, Compiled<kAvx512>::avx512);
#else
  return Compiled<kGeneric>::generic;
#endif
}

}  // namespace fastgen::cpu
