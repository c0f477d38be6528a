#include "core/faults.h"

#include <ucontext.h>

#include <vector>

#include "core/engine.h"

namespace fastgen::emulator {

namespace {

constexpr size_t kHandlerStackBytes = 256 * 1024;  // making a report takes more than the usual 8 KiB

Site program_counter(void* context) {
  [[maybe_unused]] const auto* interrupted = static_cast<const ucontext_t*>(context);
#if defined(__x86_64__)
  return static_cast<Site>(interrupted->uc_mcontext.gregs[REG_RIP]) + 1;
#elif defined(__aarch64__)
  return static_cast<Site>(interrupted->uc_mcontext.pc) + 1;
#else
  return 0;
#endif
}

FaultGuard* installed = nullptr;

}  // namespace

void FaultGuard::handle(int signal, siginfo_t* info, void* context) {
  if (running == nullptr) {  // not ours: it happens again, to the handler before us
    sigaction(signal, signal == SIGSEGV ? &installed->old_segv_ : &installed->old_bus_, nullptr);
    return;
  }
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  const uintptr_t stack = running->fiber.stack_begin();
  const bool full = address < stack && stack - address <= Fiber::kStackBytes;
  // The kernel's stack is left for good: fail() goes on with the scheduler.
  Engine::get().fail(
      full ? kind::kOutOfBounds : kind::kMisaligned,
      full ? "the thread's local variables take over " + std::to_string(Fiber::kStackBytes / 1024) + " KiB"
           : "the processor refuses an access: is a vector or a struct at a multiple of its alignment?",
      program_counter(context));
}

FaultGuard::FaultGuard() {
  thread_local std::vector<char> memory(kHandlerStackBytes);
  stack_t stack = {};
  stack.ss_sp = memory.data(), stack.ss_size = memory.size();
  sigaltstack(&stack, &old_stack_);
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &old_segv_);
  sigaction(SIGBUS, &action, &old_bus_);
  installed = this;
}

FaultGuard::~FaultGuard() {
  sigaction(SIGSEGV, &old_segv_, nullptr);
  sigaction(SIGBUS, &old_bus_, nullptr);
  sigaltstack(&old_stack_, nullptr);
}

}  // namespace fastgen::emulator
