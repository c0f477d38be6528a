// PyTorch's CPU memory as device memory of the emulator: tensors allocated while this allocator is installed are
// registered, and lie far apart.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include "core/control.h"
#include "core/slots.h"

namespace fastgen {

namespace {

constexpr uint8_t kPriority = 255;

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, c10::Device(c10::DeviceType::CPU)};
    void* memory = emulator::allocate(bytes);
    emulator::add_memory(memory, bytes, emulator::in_operator());
    return {memory, memory, release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return release; }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
  static void release(void* pointer) {
    if (pointer == nullptr) return;
    emulator::remove_memory(pointer);
    emulator::release(pointer);
  }
};

Allocator allocator;

}  // namespace

}  // namespace fastgen

extern "C" void fastgen_emulator_install_allocator(int on) {
  c10::SetAllocator(c10::DeviceType::CPU, on != 0 ? &fastgen::allocator : c10::GetDefaultCPUAllocator(),
                    fastgen::kPriority);
}
