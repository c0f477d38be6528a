// Shared-memory bank conflicts (CUDA C++ Programming Guide, "Shared Memory"): 32 banks of 4 bytes; a warp's access of
// 4, 8 or 16 bytes a lane takes one, two or four passes at best, and one more for every further word of a bank.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <unordered_map>

#include "core/control.h"
#include "core/stamp.h"

namespace fastgen::emulator {

// Lanes run one at a time here, so a warp's access is put together from the n-th access of each of its lanes at the
// same instruction. Where lanes of a warp loop different numbers of times that is an estimate.
class BankCounter {
 public:
  void access(int warp, int lane, Site site, size_t offset, size_t bytes);
  // Adds the counts to the counters and resets.
  void finish(Counters& counters);
  void clear() { instructions_.clear(), sums_ = {}; }

 private:
  struct Together {
    uint32_t lanes = 0;
    uint32_t bytes = 0;
    std::array<uint32_t, 32> offsets;
  };
  struct Instruction {
    std::array<uint32_t, 32> count = {};  // accesses of each lane
    uint32_t first = 0;                   // number of the oldest unfinished access
    std::deque<Together> open;
  };
  static void count(const Together& access, Counters& counters);

  std::unordered_map<uint64_t, Instruction> instructions_;
  Counters sums_;
};

}  // namespace fastgen::emulator
