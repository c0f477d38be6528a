// Work memory of the CPU kernels.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "common/cpu/pages.h"
#include "common/types.h"

namespace fastgen::cpu {

struct FreeAligned {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};

// 64-byte aligned floats, in large pages if they are many.
using Memory = std::unique_ptr<float[], FreeAligned>;

inline Memory allocate(int64_t count) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(float);
  Memory memory(static_cast<float*>(::operator new[](bytes, std::align_val_t(64))));
  prefer_large_pages(memory.get(), bytes);
  return memory;
}

// Cuts memory into 64-byte aligned arrays; without memory it only counts.
class Cutter {
 public:
  explicit Cutter(float* memory) : memory_(memory) {}
  float* take(int64_t count) {
    float* const array = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += ceil_div(count, 16) * 16;
    return array;
  }
  // The same for other types, which need no more than 64-byte alignment and no destructor.
  template <typename T>
  T* take_of(int64_t count) {
    static_assert(alignof(T) <= 64 && sizeof(T) % sizeof(float) == 0, "cut from aligned floats");
    return reinterpret_cast<T*>(take(count * static_cast<int64_t>(sizeof(T) / sizeof(float))));
  }
  int64_t used() const { return used_; }

 private:
  float* memory_;
  int64_t used_ = 0;
};

}  // namespace fastgen::cpu
