// Warp instructions: lanes wait for each other.
#include <cstring>
#include <optional>

#include "core/engine.h"

namespace fastgen::emulator {

namespace {

std::string mask_text(uint32_t mask) {
  char buffer[16];
  snprintf(buffer, sizeof(buffer), "0x%08x", mask);
  return buffer;
}

}  // namespace

// The compiler may have made several copies of one call: then the lines agree all the way out to the kernel.
bool Engine::same_place(const Where& where, Site site, const Where& other, Site other_site) {
  if (where.line() != other.line() || where.column() != other.column()) return false;
  const char *file = where.file_name(), *other_file = other.file_name();
  if (file != other_file && std::strcmp(file, other_file) != 0) return false;
  if (site == other_site) return true;
  const bool known = place_of(site).find(" in ") != std::string::npos;
  return !known || place_of(site) == place_of(other_site);
}

void Engine::meet(const WarpInstruction& instruction, uint64_t operands, uint32_t mask, void* lane, const Where& where,
                  Site site) {
  Thread& thread = self();
  const uint32_t bit = 1u << thread.lane;
  const auto name = [&] { return std::string(instruction.name); };  // where it fails: lanes come here all the time
  if ((mask & bit) == 0) {
    fail(kind::kMisuse, name() + ": the mask " + mask_text(mask) + " does not name the calling lane", where);
  }
  if ((mask & ~lanes_of(thread.warp)) != 0) {
    fail(kind::kMisuse, name() + ": the mask " + mask_text(mask) + " names lanes the warp does not have", where);
  }
  if (instruction.needs_all && (mask & exited[thread.warp]) != 0) {
    const int gone = thread.warp * 32 + __builtin_ctz(mask & exited[thread.warp]);
    fail(kind::kExited, name() + " waits for " + name_of(gone) + ", which has returned", where);
  }
  if (instruction.aligned) check_alignment_of_warp(instruction.name, where, site);
  auto& here = meetings[thread.warp];
  Meeting* meeting = nullptr;
  for (Meeting* candidate : here) {
    const bool fits = candidate->instruction == &instruction && candidate->mask == mask &&
                      candidate->operands == operands && (candidate->arrived & bit) == 0 &&
                      (!instruction.aligned || same_place(candidate->where, candidate->site, where, site));
    if (fits) meeting = candidate;
  }
  // The meeting lives on the stack of its first lane, which waits until it is over.
  std::optional<Meeting> own;
  if (meeting == nullptr) {
    meeting = &own.emplace(Meeting{&instruction, operands, mask, 0, where, site});
    here.push_back(meeting);
  }
  meeting->arrived |= bit;
  meeting->lanes[thread.lane] = lane;
  if (meeting->arrived == (mask & ~exited[thread.warp])) {
    finish(*meeting, thread.warp);
  } else {
    wait({instruction.name, where, instruction.aligned, true, site});
  }
}

void Engine::finish(Meeting& meeting, int warp) {
  std::erase(meetings[warp], &meeting);
  meeting.instruction->run(meeting);
  for (int lane = 0; lane < 32; ++lane) {
    const int index = warp * 32 + lane;
    if ((meeting.arrived >> lane & 1) != 0 && index != current_index) wake(index);
  }
}

void Engine::lane_exited(int warp, uint32_t lane) {
  const auto waiting = meetings[warp];
  for (Meeting* meeting : waiting) {
    if ((meeting->mask & lane) == 0) continue;
    // bar.warp.sync and the matrix instructions want every lane; shfl.sync and vote.sync those that have not exited.
    if (meeting->instruction->needs_all) {
      fail(kind::kExited, std::string("the thread returned, but others wait for it in ") + meeting->instruction->name,
           meeting->where);
    }
    if (meeting->arrived == (meeting->mask & ~exited[warp])) finish(*meeting, warp);
  }
}

// --------------------------------------------------------------------------------------------------
// bar.warp.sync, shfl.sync, vote.sync

namespace {

template <typename Lane, typename Body>
void for_each_lane(Meeting& meeting, Body&& body) {
  for (int lane = 0; lane < 32; ++lane) {
    if (meeting.lanes[lane] != nullptr) body(lane, *static_cast<Lane*>(meeting.lanes[lane]));
  }
}

// Orders memory among the lanes.
void run_sync(Meeting& meeting) {
  Gathering all;
  for_each_lane<Thread>(meeting, [&](int, Thread& thread) {
    all.add(thread.knowledge, Engine::get().thread_count, thread.index, thread.epoch++);
  });
  const Knowledge known = all.share();
  for_each_lane<Thread>(meeting, [&](int, Thread& thread) { thread.knowledge = known; });
}

struct ShuffleLane {
  uint32_t value, result;
  int source;
  Where where;
};

void run_shuffle(Meeting& meeting) {
  for_each_lane<ShuffleLane>(meeting, [&](int lane, ShuffleLane& mine) {
    const auto* theirs = static_cast<const ShuffleLane*>(meeting.lanes[mine.source]);
    if (theirs == nullptr) {
      Engine& engine = Engine::get();
      engine.current_index = engine.current_index / 32 * 32 + lane;  // whose fault it is
      engine.fail(kind::kMisuse, "shuffle: reads lane " + std::to_string(mine.source) + ", which does not take part",
                  mine.where);
    }
    mine.result = theirs->value;
  });
}

struct VoteLane {
  bool predicate;
  uint32_t result;
};

void run_vote(Meeting& meeting) {
  uint32_t votes = 0;
  for_each_lane<VoteLane>(meeting, [&](int lane, VoteLane& vote) { votes |= uint32_t{vote.predicate} << lane; });
  for_each_lane<VoteLane>(meeting, [&](int, VoteLane& vote) { vote.result = votes; });
}

constexpr WarpInstruction kSync = {"sync_warp", false, true, run_sync};
constexpr WarpInstruction kShuffle = {"shuffle", false, false, run_shuffle};
constexpr WarpInstruction kVote = {"vote", false, false, run_vote};

bool first_of(uint32_t mask) { return running->lane == __builtin_ctz(mask | 1u << 31); }

}  // namespace

void sync_warp(uint32_t mask, Where where) {
  Engine& engine = Engine::get();
  if (engine.left_out("sync_warp", where)) return;
  if (first_of(mask)) ++engine.counters->warp_barriers;
  engine.meet(kSync, 0, mask, running, where);
}

uint32_t shuffle(Shuffle mode, uint32_t mask, uint32_t value, int operand, Where where) {
  Engine& engine = Engine::get();
  const int lane = running->lane;
  operand &= 31;  // higher bits are ignored
  int source = lane;
  switch (mode) {
    case Shuffle::kXor: source = lane ^ operand; break;
    case Shuffle::kUp: source = lane - operand; break;
    case Shuffle::kDown: source = lane + operand; break;
    case Shuffle::kIndex: source = operand; break;
  }
  // A source outside the warp gives the lane's own value.
  if (source < 0 || source > 31) source = lane;
  ShuffleLane mine = {value, 0, source, where};
  if (first_of(mask)) ++engine.counters->shuffles;
  engine.meet(kShuffle, static_cast<uint64_t>(mode), mask, &mine, where);
  return mine.result;
}

uint32_t vote(Vote kind, uint32_t mask, bool predicate, Where where) {
  VoteLane mine = {predicate, 0};
  Engine::get().meet(kVote, static_cast<uint64_t>(kind), mask, &mine, where);
  return mine.result;
}

}  // namespace fastgen::emulator
