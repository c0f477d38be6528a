#include "core/banks.h"

#include <algorithm>
#include <vector>

namespace fastgen::emulator {

void BankCounter::access(int warp, int lane, Site site, size_t offset, size_t bytes) {
  Instruction& instruction = instructions_[static_cast<uint64_t>(site) << 5 ^ static_cast<uint64_t>(warp)];
  const uint32_t which = instruction.count[lane]++;
  if (which < instruction.first) return;  // its warp's access was counted without it
  const uint32_t number = which - instruction.first;
  while (instruction.open.size() <= number) instruction.open.emplace_back();
  Together& together = instruction.open[number];
  together.lanes |= 1u << lane;
  together.bytes = static_cast<uint32_t>(bytes);
  together.offsets[lane] = static_cast<uint32_t>(offset);
  constexpr size_t kMostOpen = 4096;  // what is older lacks lanes that do not come
  while (!instruction.open.empty() &&
         (instruction.open.front().lanes == 0xffffffffu || instruction.open.size() > kMostOpen)) {
    count(instruction.open.front(), sums_);
    instruction.open.pop_front();
    ++instruction.first;
  }
}

void BankCounter::count(const Together& access, Counters& counters) {
  const int words = static_cast<int>((access.bytes + 3) / 4);
  const int lanes_a_pass = words <= 1 ? 32 : words == 2 ? 16 : 8;
  ++counters.shared_accesses;
  for (int first = 0; first < 32; first += lanes_a_pass) {
    std::vector<uint32_t> touched;  // distinct words
    for (int lane = first; lane < first + lanes_a_pass; ++lane) {
      if ((access.lanes >> lane & 1) == 0) continue;
      for (int word = 0; word < words; ++word) touched.push_back(access.offsets[lane] / 4 + word);
    }
    if (touched.empty()) continue;
    std::sort(touched.begin(), touched.end());
    touched.erase(std::unique(touched.begin(), touched.end()), touched.end());
    std::array<int, 32> of_bank = {};
    for (const uint32_t word : touched) ++of_bank[word % 32];
    counters.shared_passes += *std::max_element(of_bank.begin(), of_bank.end());
    ++counters.shared_passes_least;
  }
}

void BankCounter::finish(Counters& counters) {
  for (const auto& [key, instruction] : instructions_) {
    for (const Together& access : instruction.open) count(access, sums_);
  }
  counters.shared_accesses += sums_.shared_accesses;
  counters.shared_passes += sums_.shared_passes;
  counters.shared_passes_least += sums_.shared_passes_least;
  sums_ = {};
  instructions_.clear();
}

}  // namespace fastgen::emulator
