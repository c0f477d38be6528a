// Shadow state of each byte: the last write and the reads since.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/stamp.h"

namespace fastgen::emulator {

struct Cell {
  Stamp write;  // none: uninitialized
  Stamp read;   // one read, or a reference into Readers
};

// Happens-before: whether an access is ordered before the current one of a thread, because it is the thread's own or
// barriers order them. Blocks are unordered; accesses before the launch (epoch 0) come before everything.
struct Before {
  const uint32_t* known = nullptr;  // epochs of the block's threads; null: unordered
  int thread = 0;                   // -1: none, ``known`` has all
  uint64_t block = 0;
  size_t known_count = 0;
  // Of accesses by the asynchronous proxy: the threads, and the epochs up to which their accesses come before a fence
  // between the proxies that comes before this access (proxies.h).
  bool asynchronous = false;
  int threads = 0;
  const uint32_t* fenced = nullptr;  // null: none

  bool operator()(Stamp stamp) const {
    if (stamp.epoch() == 0) return true;
    if (stamp.block() != block) return false;
    const auto index = static_cast<size_t>(stamp.thread());
    return stamp.thread() == thread || (index < known_count && known[index] >= stamp.epoch());
  }
  // Whether a write that comes before is also visible to the proxy of this access.
  bool reaches(Stamp write) const {
    if (!asynchronous || write.epoch() == 0 || write.block() != block || write.thread() >= threads) return true;
    return fenced != nullptr && fenced[write.thread()] >= write.epoch();
  }
};

// Sets of reads, shared between the many bytes that were read alike. A set is its newest read and the rest, as a
// reference that can stand in a cell.
class Readers {
 public:
  // The set with one read more. Now and then it is cleared of reads that come before the new one: what comes after
  // the new one comes after them. Blocks run one after the other, so of the reads of other blocks one is enough.
  Stamp with(Stamp set, Stamp read, const Before& before);
  // A read in the set that does not come before; none if all do.
  Stamp unordered(Stamp set, const Before& before) const;
  // Forgets all sets if there are many. A forgotten set still counts as a read by an unknown thread of another block.
  void trim(size_t most);

 private:
  struct Node {
    Stamp rest, newest;
    uint32_t length, clear_at;  // so long a set is cleared
  };
  struct Hash {
    size_t operator()(const std::pair<uint64_t, uint64_t>& key) const {
      return (key.first * 0x9E3779B97F4A7C15u) ^ (key.second * 0xC2B2AE3D27D4EB4Fu >> 7);
    }
  };

  Stamp node(Stamp rest, Stamp newest, uint32_t clear_at);
  Node at(Stamp set) const;

  std::vector<Node> nodes_;
  uint64_t forgotten_ = 0;  // nodes before the first of nodes_
  std::unordered_map<std::pair<uint64_t, uint64_t>, Stamp, Hash> known_;
};

enum class Touch { kRead, kWrite, kAtomic };

// What is wrong with an access, and the other access that makes it so.
struct Conflict {
  enum Kind { kNone, kUnwritten, kRace, kInFlight, kUnfenced } kind = kNone;
  size_t offset = 0;  // of the first such byte
  Stamp other;
  bool other_wrote = false;
};

// Checks an access to ``count`` cells and records it. On a conflict it stops there.
Conflict touch_cells(Cell* cells, size_t count, Touch touch, Stamp now, Readers& readers, const Before& before);

}  // namespace fastgen::emulator
