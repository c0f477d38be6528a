#include "core/shadow.h"

namespace fastgen::emulator {

Stamp Readers::node(Stamp rest, Stamp newest) {
  const auto [entry, fresh] = known_.try_emplace({rest.bits, newest.bits}, Stamp::reference(nodes_.size()));
  if (fresh) nodes_.push_back({rest, newest});
  return entry->second;
}

Stamp Readers::with(Stamp set, Stamp read, const Before& before) {
  if (set.none() || (!set.is_reference() && before(set))) return read;
  if (set == last_set_ && read == last_read_) return last_result_;
  const auto [entry, fresh] = results_.try_emplace({set.bits, read.bits}, Stamp{});
  if (fresh) {
    std::vector<Stamp> kept;
    bool foreign = false;
    for (Stamp at = set; !at.none();) {
      const Node here = at.is_reference() ? nodes_[at.index()] : Node{{}, at};
      const bool other_block = here.newest.block() != before.block;
      if (!before(here.newest) && !(other_block && foreign)) kept.push_back(here.newest);
      foreign = foreign || other_block;
      at = here.rest;
    }
    Stamp result;
    for (size_t i = kept.size(); i-- > 0;) result = result.none() ? kept[i] : node(result, kept[i]);
    entry->second = result.none() ? read : node(result, read);
  }
  last_set_ = set, last_read_ = read, last_result_ = entry->second;
  return last_result_;
}

Stamp Readers::unordered(Stamp set, const Before& before) const {
  for (Stamp at = set; !at.none();) {
    if (!at.is_reference()) return before(at) ? Stamp{} : at;
    const Node& here = nodes_[at.index()];
    if (!before(here.newest)) return here.newest;
    at = here.rest;
  }
  return {};
}

void Readers::clear() {
  nodes_.clear(), known_.clear(), results_.clear();
  last_set_ = last_read_ = last_result_ = {};
}

Conflict touch_cells(Cell* cells, size_t count, Touch touch, Stamp now, Readers& readers, const Before& before) {
  Cell seen, left;  // neighbours mostly share their history, and so their future
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
