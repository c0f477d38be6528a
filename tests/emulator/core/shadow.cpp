#include "core/shadow.h"

#include <algorithm>
#include <bitset>

namespace fastgen::emulator {

namespace {

constexpr uint32_t kFirstClearing = 32;

// Thread, epoch and block: another line of the same makes no new reader.
uint64_t who(Stamp stamp) { return stamp.bits & ((uint64_t{1} << 48) - 1); }

}  // namespace

Readers::Node Readers::at(Stamp set) const {
  if (!set.is_reference()) return {{}, set, 1, kFirstClearing};
  if (set.index() >= forgotten_) return nodes_[set.index() - forgotten_];
  // Of a block that has ended; no block has this number.
  return {{}, Stamp::make(0, Stamp::kEpochs - 1, Stamp::kBlocks - 1, Stamp::kSites - 1), 1, kFirstClearing};
}

Stamp Readers::node(Stamp rest, Stamp newest, uint32_t clear_at) {
  const auto [entry, fresh] =
      known_.try_emplace({rest.bits, newest.bits}, Stamp::reference(forgotten_ + nodes_.size()));
  if (fresh) nodes_.push_back({rest, newest, rest.none() ? 1 : at(rest).length + 1, clear_at});
  return entry->second;
}

Stamp Readers::with(Stamp set, Stamp read, const Before& before) {
  if (set.none() || (!set.is_reference() && before(set))) return read;
  const Node top = at(set);
  if (who(top.newest) == who(read)) return set;
  if (top.length < top.clear_at) return node(set, read, top.clear_at);
  std::vector<Stamp> kept;
  std::bitset<Stamp::kThreads> seen;
  bool foreign = false;
  for (Stamp rest = set; !rest.none();) {
    const Node here = at(rest);
    const bool other_block = here.newest.block() != before.block;
    const bool again = other_block ? foreign : seen[here.newest.thread()];
    if (!again && !before(here.newest)) kept.push_back(here.newest);
    if (other_block) {
      foreign = true;
    } else {
      seen[here.newest.thread()] = true;
    }
    rest = here.rest;
  }
  const uint32_t next = std::max<uint32_t>(kFirstClearing, 2 * kept.size() + 2);
  Stamp result;
  for (size_t i = kept.size(); i-- > 0;) result = result.none() ? kept[i] : node(result, kept[i], next);
  return result.none() ? read : node(result, read, next);
}

Stamp Readers::unordered(Stamp set, const Before& before) const {
  while (!set.none()) {
    const Node here = at(set);
    if (!before(here.newest)) return here.newest;
    set = here.rest;
  }
  return {};
}

void Readers::trim(size_t most) {
  if (nodes_.size() <= most) return;
  forgotten_ += nodes_.size();
  nodes_.clear(), known_.clear();
}

Conflict touch_cells(Cell* cells, size_t count, Touch touch, Stamp now, Readers& readers, const Before& before) {
  Cell seen, left;  // neighbors mostly share their history, and so their future
  for (size_t i = 0; i < count; ++i) {
    Cell& cell = cells[i];
    if (i > 0 && cell.write == seen.write && cell.read == seen.read) {
      cell = left;
      continue;
    }
    seen = cell;
    if (cell.write.is_reference()) return {Conflict::kInFlight, i, cell.write, true};
    if (touch != Touch::kWrite && cell.write.none()) return {Conflict::kUnwritten, i, {}, false};
    const bool both_atomic = touch == Touch::kAtomic && cell.write.atomic();
    if (!cell.write.none() && !both_atomic && !before(cell.write)) return {Conflict::kRace, i, cell.write, true};
    if (!cell.write.none() && !before.reaches(cell.write)) return {Conflict::kUnfenced, i, cell.write, true};
    if (touch == Touch::kRead) {
      cell.read = readers.with(cell.read, now, before);
    } else {
      const Stamp reader = readers.unordered(cell.read, before);
      if (!reader.none()) return {Conflict::kRace, i, reader, false};
      cell.write = touch == Touch::kAtomic ? Stamp{now.bits | Stamp::kAtomic} : now;
      cell.read = {};
    }
    left = cell;
  }
  return {};
}

}  // namespace fastgen::emulator
