// Work memory of the CPU kernels.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "common/types.h"

namespace fastgen::cpu {

struct FreeAligned {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};

// 64-byte aligned floats.
using Memory = std::unique_ptr<float[], FreeAligned>;

inline Memory allocate(int64_t count) {
  return Memory(
      static_cast<float*>(::operator new[](static_cast<size_t>(count) * sizeof(float), std::align_val_t(64))));
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
  int64_t used() const { return used_; }

 private:
  float* memory_;
  int64_t used_ = 0;
};

}  // namespace fastgen::cpu
