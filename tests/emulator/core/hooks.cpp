// Hooks of the compiler's instrumentation of the kernels.
#include <cstdio>
#include <cstring>

#include "core/engine.h"

// -fsanitize=thread: before every access that the kernels' code makes, but for local variables that the compiler keeps
// to itself. The thread's own stack is let through.
namespace {

using fastgen::emulator::Engine;
using fastgen::emulator::Fiber;
using fastgen::emulator::running;
using fastgen::emulator::Site;
using fastgen::emulator::Touch;
namespace kind = fastgen::emulator::kind;

bool checking = true;

// As in the compilers' ubsan runtimes.
struct Location {
  const char* file;
  uint32_t line, column;
};
struct Type {
  uint16_t kind, information;
  char name[1];
};
struct TypeMismatch {
  Location location;
  const Type* type;
  unsigned char log_alignment, check;
};
struct OutOfBounds {
  Location location;
  const Type *array, *index;
};

inline __attribute__((always_inline)) void hook(void* address, size_t bytes, Touch touch, size_t alignment) {
  if (running == nullptr || !checking) return;
  if (reinterpret_cast<uintptr_t>(address) - running->fiber.stack_begin() < Fiber::kStackBytes) {
    if (running->written == nullptr) return;
    return Engine::get().access_registers(address, bytes, touch, reinterpret_cast<Site>(__builtin_return_address(0)));
  }
  Engine::get().access(address, bytes, touch, reinterpret_cast<Site>(__builtin_return_address(0)), alignment);
}

}  // namespace

namespace fastgen::emulator {
void check_accesses(bool on) { checking = on; }
}  // namespace fastgen::emulator

extern "C" {
#define FASTGEN_HOOK(bytes, alignment)                                                                 \
  void __tsan_read##bytes(void* address) { hook(address, bytes, Touch::kRead, alignment); }            \
  void __tsan_write##bytes(void* address) { hook(address, bytes, Touch::kWrite, alignment); }          \
  void __tsan_volatile_read##bytes(void* address) { hook(address, bytes, Touch::kRead, alignment); }   \
  void __tsan_volatile_write##bytes(void* address) { hook(address, bytes, Touch::kWrite, alignment); } \
  void __tsan_unaligned_read##bytes(void* address) { hook(address, bytes, Touch::kRead, 1); }          \
  void __tsan_unaligned_write##bytes(void* address) { hook(address, bytes, Touch::kWrite, 1); }        \
  void __tsan_unaligned_volatile_read##bytes(void* address) { hook(address, bytes, Touch::kRead, 1); } \
  void __tsan_unaligned_volatile_write##bytes(void* address) { hook(address, bytes, Touch::kWrite, 1); }
FASTGEN_HOOK(1, 1)
FASTGEN_HOOK(2, 2)
FASTGEN_HOOK(4, 4)
FASTGEN_HOOK(8, 8)
// The compiler moves 16 bytes of whatever is aligned to 8 at once; nvcc does not. Vectors of 16 come by load().
FASTGEN_HOOK(16, 8)
#undef FASTGEN_HOOK
void __tsan_read_range(void* address, size_t bytes) { hook(address, bytes, Touch::kRead, 1); }
void __tsan_write_range(void* address, size_t bytes) { hook(address, bytes, Touch::kWrite, 1); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
// Of objects with virtual functions, which only host code has: the launchers' exceptions.
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// The guard of a function's static variable.
uint8_t __tsan_atomic8_load(const volatile uint8_t* address, int) { return __atomic_load_n(address, __ATOMIC_ACQUIRE); }
uint64_t __tsan_atomic64_load(const volatile uint64_t* address, int) {
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}
// The functions, where the compiler does not take them apart: clang calls these, the linker renames others (--wrap).
void* __tsan_memcpy(void* target, const void* source, size_t bytes) {
  if (bytes != 0) hook(const_cast<void*>(source), bytes, Touch::kRead, 1);
  if (bytes != 0) hook(target, bytes, Touch::kWrite, 1);
  return memcpy(target, source, bytes);
}
void* __tsan_memmove(void* target, const void* source, size_t bytes) {
  if (bytes != 0) hook(const_cast<void*>(source), bytes, Touch::kRead, 1);
  if (bytes != 0) hook(target, bytes, Touch::kWrite, 1);
  return memmove(target, source, bytes);
}
void* __tsan_memset(void* target, int value, size_t bytes) {
  if (bytes != 0) hook(target, bytes, Touch::kWrite, 1);
  return memset(target, value, bytes);
}
// -fsanitize=alignment and bounds, called where something is wrong. The struct and the names are the compiler's.
void __ubsan_handle_type_mismatch_v1(const TypeMismatch* what, uintptr_t address) {
  if (running == nullptr) return;
  char text[32];
  snprintf(text, sizeof(text), "0x%zx", static_cast<size_t>(address));
  Engine::get().fail(kind::kMisaligned,
                     "uses a " + std::string(what->type->name) + " at " + text + ", no multiple of its alignment",
                     reinterpret_cast<Site>(__builtin_return_address(0)));
}
void __ubsan_handle_out_of_bounds(const OutOfBounds* what, uintptr_t index) {
  if (running == nullptr) return;
  Engine::get().fail(kind::kOutOfBounds,
                     "index " + std::to_string(static_cast<int>(index)) + " of an array of type " + what->array->name,
                     reinterpret_cast<Site>(__builtin_return_address(0)));
}
void* __wrap_memcpy(void* target, const void* source, size_t bytes) __attribute__((alias("__tsan_memcpy")));
void* __wrap_memmove(void* target, const void* source, size_t bytes) __attribute__((alias("__tsan_memmove")));
void* __wrap_memset(void* target, int value, size_t bytes) __attribute__((alias("__tsan_memset")));
}
