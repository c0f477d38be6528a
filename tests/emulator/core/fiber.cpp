#include "core/fiber.h"

#include <sys/mman.h>

#include <new>

namespace fastgen::emulator {

namespace {

constexpr size_t kGuardBytes = 64 * 1024;  // a multiple of every page size

char* map_stack() {
  void* memory = mmap(nullptr, kGuardBytes + Fiber::kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  return static_cast<char*>(memory) + kGuardBytes;
}

}  // namespace

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes);
}

}  // namespace fastgen::emulator

#if defined(FASTGEN_FIBER_UCONTEXT)

namespace fastgen::emulator {

void Fiber::start(void (*entry)()) {
  if (stack_ == nullptr) stack_ = map_stack();
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::change(Fiber& from, Fiber& to) { swapcontext(&from.context_, &to.context_); }

}  // namespace fastgen::emulator

#else

// void fastgen_change_stack(void** saved, void* next): keeps the callee-saved registers of the ABI on the old stack.
#if defined(__x86_64__)
asm(R"(
.text
.globl fastgen_change_stack
.hidden fastgen_change_stack
.type fastgen_change_stack, @function
fastgen_change_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastgen_change_stack, .-fastgen_change_stack
)");
constexpr int kSavedWords = 6, kReturnWord = 6, kFrameWords = 8;
#else
asm(R"(
.text
.globl fastgen_change_stack
.hidden fastgen_change_stack
.type fastgen_change_stack, %function
fastgen_change_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size fastgen_change_stack, .-fastgen_change_stack
)");
constexpr int kSavedWords = 20, kReturnWord = 11, kFrameWords = 20;
#endif

extern "C" void fastgen_change_stack(void** saved, void* next);

namespace fastgen::emulator {

void Fiber::start(void (*entry)()) {
  if (stack_ == nullptr) stack_ = map_stack();
  static_assert(kSavedWords <= kFrameWords && kReturnWord < kFrameWords);
  void** frame = reinterpret_cast<void**>(stack_ + kStackBytes) - kFrameWords;
  for (int i = 0; i < kFrameWords; ++i) frame[i] = nullptr;
  frame[kReturnWord] = reinterpret_cast<void*>(entry);
  stack_pointer_ = frame;
}

void Fiber::change(Fiber& from, Fiber& to) { fastgen_change_stack(&from.stack_pointer_, to.stack_pointer_); }

}  // namespace fastgen::emulator

#endif
