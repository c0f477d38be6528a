// Device memory on the host: exact sizes, far apart. (../cuda/ has the same for a GPU.)
#pragma once

#include <cstring>

#include "core/control.h"
#include "core/slots.h"

namespace fastgen {

class DeviceMemory {
 public:
  // A copy of the bytes; uninitialized memory if ``source`` is null.
  DeviceMemory(const void* source, size_t bytes, bool read_only) : bytes_(bytes) {
    memory_ = emulator::allocate(bytes);
    emulator::add_memory(data(), bytes, source == nullptr, read_only);
    if (source != nullptr) memcpy(data(), source, bytes);
  }
  ~DeviceMemory() {
    emulator::remove_memory(data());
    emulator::release(memory_);
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  void* data() { return memory_; }
  void read(void* target) { memcpy(target, data(), bytes_); }

 private:
  size_t bytes_;
  void* memory_;
};

}  // namespace fastgen
