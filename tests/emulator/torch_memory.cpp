// PyTorch's CPU memory as device memory of the emulator: tensors allocated while this allocator is installed are
// registered, with guard zones around them.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <new>

#include "core/control.h"

namespace fastgen {

namespace {

constexpr size_t kAround = 512;  // bytes before and after
constexpr uint8_t kPriority = 255;

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, c10::Device(c10::DeviceType::CPU)};
    const size_t whole = (bytes + 2 * kAround + 63) / 64 * 64;
    auto* memory = static_cast<char*>(std::aligned_alloc(64, whole));
    if (memory == nullptr) throw std::bad_alloc();
    emulator::add_memory(memory + kAround, bytes, emulator::in_operator());
    return {memory + kAround, memory + kAround, release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return release; }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
  static void release(void* pointer) {
    if (pointer == nullptr) return;
    emulator::remove_memory(pointer);
    std::free(static_cast<char*>(pointer) - kAround);
  }
};

Allocator allocator;

}  // namespace

}  // namespace fastgen

extern "C" void fastgen_emulator_install_allocator(int on) {
  c10::SetAllocator(c10::DeviceType::CPU, on != 0 ? &fastgen::allocator : c10::GetDefaultCPUAllocator(),
                    fastgen::kPriority);
}
