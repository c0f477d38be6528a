// Vector clocks (Lamport 1978; Mattern 1989; FastTrack, Flanagan and Freund 2009).
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace fastgen::emulator {

// An access of thread u in epoch e comes before what a thread does now if knowledge[u] >= e.
using Knowledge = std::shared_ptr<const std::vector<uint32_t>>;

// The knowledge of several threads together, gathered as they arrive somewhere.
class Gathering {
 public:
  void add(const Knowledge& knowledge, int threads, int thread, uint32_t epoch) {
    grow(std::max(threads, thread + 1));
    if (knowledge != nullptr && knowledge != last_) {
      add(*knowledge);
      last_ = knowledge;
    }
    epochs_[thread] = std::max(epochs_[thread], epoch);
  }
  void add(const Gathering& other) { add(other.epochs_); }
  // Of threads, and of what else kernels that use the asynchronous proxy keep (proxies.h), which have longer vectors.
  void add(const std::vector<uint32_t>& epochs) {
    grow(epochs.size());
    for (size_t i = 0; i < epochs.size(); ++i) epochs_[i] = std::max(epochs_[i], epochs[i]);
  }
  bool empty() const { return epochs_.empty(); }
  Knowledge share() const { return std::make_shared<const std::vector<uint32_t>>(epochs_); }
  void clear() {
    epochs_.clear();
    last_ = nullptr;
  }

 private:
  void grow(size_t size) {
    if (epochs_.size() < size) epochs_.resize(size, 0);
  }

  std::vector<uint32_t> epochs_;
  Knowledge last_;  // added already; held, so that its address is not used again
};

}  // namespace fastgen::emulator
