// Device memory on the host: exact sizes, with guard zones. (../cuda/ has the same for a GPU.)
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>

#include "core/control.h"

namespace fastgen {

class DeviceMemory {
 public:
  // A copy of the bytes; uninitialized memory if ``source`` is null.
  DeviceMemory(const void* source, size_t bytes, bool read_only) : bytes_(bytes) {
    constexpr size_t kLine = 64;
    memory_ = static_cast<char*>(std::aligned_alloc(kLine, (bytes + 2 * kAround + kLine - 1) / kLine * kLine));
    if (memory_ == nullptr) throw std::bad_alloc();
    emulator::add_memory(data(), bytes, source == nullptr, read_only);
    if (source != nullptr) memcpy(data(), source, bytes);
  }
  ~DeviceMemory() {
    emulator::remove_memory(data());
    std::free(memory_);
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  void* data() { return memory_ + kAround; }
  void read(void* target) { memcpy(target, data(), bytes_); }

 private:
  static constexpr size_t kAround = 512;
  size_t bytes_;
  char* memory_;
};

}  // namespace fastgen
