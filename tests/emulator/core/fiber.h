// Stackful coroutines: a stack, and the switch between stacks.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(FASTGEN_FIBER_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define FASTGEN_FIBER_UCONTEXT
#endif
#if defined(FASTGEN_FIBER_UCONTEXT)
#include <ucontext.h>
#endif

namespace fastgen::emulator {

class Fiber {
 public:
  static constexpr size_t kStackBytes = 256 * 1024;

  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next switch to this fiber calls entry(), which must never return. The stack is kept from use to use.
  void start(void (*entry)());
  uintptr_t stack_begin() const { return reinterpret_cast<uintptr_t>(stack_); }

  // Leaves the running context in ``from`` and continues ``to``.
  static void change(Fiber& from, Fiber& to);

 private:
  char* stack_ = nullptr;  // null for the context of the caller
#if defined(FASTGEN_FIBER_UCONTEXT)
  ucontext_t context_ = {};
#else
  void* stack_pointer_ = nullptr;
#endif
};

}  // namespace fastgen::emulator
