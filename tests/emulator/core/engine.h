// The state of a running kernel: block, warps and threads. Internal to the emulator.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "core/banks.h"
#include "core/clock.h"
#include "core/control.h"
#include "core/emulator.h"
#include "core/fiber.h"
#include "core/memory.h"
#include "core/proxies.h"
#include "core/report.h"

namespace fastgen::emulator {

// What a thread waits for.
struct Waiting {
  std::string what;  // "barrier 1 of 64 threads"
  Where where;
  bool aligned = false;  // the whole warp must execute the instruction
  bool of_warp = false;  // it waits for lanes of its own warp
  Site site = 0;
};

struct Thread {
  Fiber fiber;
  int index = 0, warp = 0, lane = 0;
  dim3 position;
  enum { kReady, kWaiting, kExited } state = kReady;
  Waiting waiting;
  Knowledge knowledge;
  uint32_t epoch = 1;
  // Asynchronous copies (indices into Engine::copies): not committed, and committed group by group.
  std::vector<size_t> open_copies;
  std::deque<std::vector<size_t>> groups;
  TensorStores stores;
  bool polled = false;  // suspended after an unsuccessful poll
  uintptr_t last_looked_at = 0;
  // Local variables as registers of wgmma: those of unfinished products; whether there was a fence in this block, and
  // fences in all; at which of them each word of the stack was written last.
  std::vector<RegistersInFlight> in_flight;
  bool fenced = false;
  uint32_t fences = 0;
  std::unique_ptr<uint32_t[], FreeMemory> written;  // null before the first fence
};

struct Meeting;

// A warp instruction.
struct WarpInstruction {
  const char* name;
  bool aligned;    // the whole warp executes this very instruction
  bool needs_all;  // also lanes that have exited
  void (*run)(Meeting&);
};

struct Meeting {
  const WarpInstruction* instruction;
  uint64_t operands;  // must be equal in all lanes
  uint32_t mask = 0, arrived = 0;
  Where where;
  Site site = 0;
  void* lanes[32] = {};  // each lane's operands and results, of an instruction-specific type
};

struct Barrier {
  int expected = 0, arrived = 0;  // threads
  Gathering gathered;
  std::vector<int> waiting;   // threads
  uint32_t participants = 0;  // warps
  uint64_t phase = 0;
  Where first;
};

struct Mbarrier {
  Stamp initialized;
  int expected = 0, pending = 0;
  int64_t bytes = 0;  // expected by transactions, not yet complete
  uint64_t phase = 0;
  Gathering current, completed;
  std::vector<int> waiting, polling;
  int copier = -1;  // the number that stands for its tensor copies in clocks
};

struct Copy {
  int owner = 0;
  uintptr_t source = 0;
  size_t target = 0;  // offset in shared memory
  int bytes = 0, valid = 0;
  Site site = 0;
  bool landed = false, visible = false;
  uint32_t arrival = 0;  // the epoch of the owner's async_copy_arrive that covers it, if there was one
  size_t place = 0;      // in Engine::flying, until visible
};

// Asynchronous work of the hardware; all events are processed before a deadlock is reported.
struct Event {  // cp.async.mbarrier.arrive: the thread's copies are complete
  int thread = 0;
  size_t mbarrier = 0;
  uint32_t epoch = 0;
  Knowledge knowledge;
  std::vector<size_t> copies;
  Site site = 0;
};

// -ftrivial-auto-var-init=pattern: what local variables hold until they are written.
#if defined(__clang__)
constexpr uint32_t kUnwrittenRegister = 0xaaaaaaaau;  // integers; floats are NaN
#else
constexpr uint32_t kUnwrittenRegister = 0xfefefefeu;
#endif

class Engine {
 public:
  static Engine& get();

  // --- scheduler.cpp
  void run_grid(const char* name, const LaunchRequest& request);
  void thread_main();
  void yield();                                 // switches to another thread
  void maybe_preempt(uintptr_t looked_at = 0);  // perhaps, before an access to memory; its address if it reads
  void maybe_preempt_at_sync();                 // perhaps, before an instruction that orders threads
  void wait(const Waiting& waiting);            // until woken
  void wake(int thread);
  void wake_pollers(std::vector<int>& pollers);
  bool chance(uint32_t one_in) { return one_in != 0 && random_() % one_in == 0; }
  void forget_calls() { calls_.clear(); }
  // Records a synchronizing call; true if it is to be left out (control.h).
  bool left_out(const char* what, const Where& where);

  // --- findings.cpp
  [[noreturn]] void fail(const char* kind, const std::string& what, Site site, const std::string& more = "");
  [[noreturn]] void fail(const char* kind, const std::string& what, const Where& where, const std::string& more = "");
  std::string name_of(int thread) const;
  const std::string& place_of(Site site);  // source_of(), cached
  std::string place_of(const Waiting& waiting);

  // Adds a static variable to a kernel's shared memory, of which the block has ``bytes`` in all.
  void note_static_shared(size_t bytes, const Where& where);

  // --- access.cpp
  void access(const void* address, size_t bytes, Touch touch, Site site, size_t alignment);
  void access_global(uintptr_t begin, size_t bytes, Touch touch, Stamp now, const Before& ordered, Site site);
  uint32_t site_number(Site site);
  Stamp stamp(Site site);
  Before before() const;
  std::string accessed_by(Stamp stamp) const;
  // Fails if the operand of an instruction is what the compiler puts into registers that were never written.
  void check_register(uint32_t bits, const char* which, Site site) {
    if (bits == kUnwrittenRegister && options.checks)
      fail(kind::kUnwritten, std::string("a register of ") + which, site);
  }
  // Accesses to shared memory by offset, on behalf of a thread.
  size_t shared_offset(const void* address, size_t bytes, const char* what, Site site);
  void access_shared(size_t offset, size_t bytes, Touch touch, Site site);
  void access_shared(size_t offset, size_t bytes, Touch touch, Stamp now, const Before& ordered, Site site);

  // --- warp.cpp
  // Waits for the lanes of the mask, then the last of them runs the instruction for all.
  // ``site`` distinguishes aligned instructions on the same line, in a helper that two branches call.
  void meet(const WarpInstruction& instruction, uint64_t operands, uint32_t mask, void* lane, const Where& where,
            Site site = 0);
  bool same_place(const Where& where, Site site, const Where& other, Site other_site);
  void finish(Meeting& meeting, int warp);

  // --- barriers.cpp
  void release(Gathering& into);  // includes the thread's earlier accesses
  void acquire(const Gathering& from);
  void check_alignment_of_warp(const char* what, const Where& where, Site site);
  size_t mbarrier_offset(const void* address, const char* what, Site site);
  Mbarrier& mbarrier(const void* address, const char* what, Site site);
  void arrive(Mbarrier& barrier, const Gathering& gathered, int count, const char* what, Site site);
  void complete_if_done(Mbarrier& barrier);

  // --- async_copy.cpp
  void land(size_t copy);
  void make_visible(const std::vector<size_t>& copies, int owner, uint32_t epoch);
  void land_some();
  void forget_copies();
  void happen(size_t event);
  void check_source_not_in_flight(uintptr_t address, size_t bytes, Site site);

  // --- proxies.cpp
  size_t clock_section() const { return static_cast<size_t>(thread_count + warp_count) + kMostCopiers; }
  void fence_between_proxies(bool mbarriers_only);
  std::vector<uint32_t> known_to(const Thread& thread) const;
  Before before_asynchronous(const std::vector<uint32_t>& known) const;
  Before before_asynchronous_global(const std::vector<uint32_t>& known) const;

  // --- tensor_copy.cpp
  void tensor_load(char* target, const TensorMap& map, const int* at, const void* barrier, Site site);
  void land_tensor_piece(size_t piece);
  void land_some_tensor_pieces();
  void check_tensor_not_in_flight(uintptr_t address, size_t bytes, Site site);

  // --- tensor_store.cpp
  void tensor_store(const TensorMap& map, const int* at, const char* source, Site site);
  void read_stored_row(StoredRow& row);
  void write_stored_row(const StoredRow& row);
  void finish_stored_rows(int thread, uint32_t last_group, bool written);
  void land_some_stored_rows();
  void check_tensor_stores_are_read();

  // --- wgmma.cpp
  void access_registers(const void* address, size_t bytes, Touch touch, Site site);
  void start_product(Product& product, const std::vector<Thread*>& lanes, const Where& where);
  void run_products(int warp, uint32_t last_group);
  void run_some_products();

  // --- setmaxnreg.cpp
  void grant_registers();

  void check_asynchronous_work_is_done();  // at the end of a block

  Thread& self() { return *threads[current_index]; }
  uint32_t lanes_of(int warp) const;  // all existing lanes of the warp

  std::mutex mutex;  // held while a kernel runs and while memory is added or removed
  Options options;
  GlobalMemory global;
  Statistics statistics;
  std::vector<std::string> sites_seen;  // of synchronizing calls, in order of appearance

  // Of the running grid and block.
  const LaunchRequest* request = nullptr;
  std::string kernel;
  Counters* counters = nullptr;
  uint64_t launch_number = 0, launches_ever = 0;  // since configure(), and in all
  uint64_t block_number = 0;
  SharedMemory shared;
  std::vector<std::unique_ptr<Thread>> threads;  // reused across blocks; the first thread_count are in use
  int thread_count = 0, warp_count = 0, live = 0, current_index = 0;
  std::vector<std::vector<Meeting*>> meetings;  // by warp
  Barrier barriers[16];
  std::map<size_t, Mbarrier> mbarriers;               // by offset in shared memory
  enum { kEarly, kLate, kWhenever } landing = kLate;  // when asynchronous copies complete
  std::vector<Copy> copies;
  std::vector<size_t> flying;                              // copies not visible yet
  uintptr_t sources_begin = UINTPTR_MAX, sources_end = 0;  // bounds of their sources
  std::vector<Event> events;
  std::vector<TensorCopy> tensor_copies;
  std::vector<TensorPiece> tensor_pieces;  // under way
  std::vector<StoredRow> stored_rows;      // under way
  int copiers = 0;                         // numbers in clocks of tensor copies (proxies.h)
  std::vector<WarpProducts> products;      // by warp
  std::vector<WarpgroupLog> warpgroups;
  std::vector<RegisterShare> register_shares;  // by warp
  int free_registers = 0;
  std::vector<int> polling;  // threads suspended after an unsuccessful poll
  uint32_t exited[32] = {};
  BankCounter banks;

 private:
  void run_block(uint64_t number);
  void reset_block();
  int choose();
  void choose_strategy();
  [[noreturn]] void stuck(bool busy);
  [[noreturn]] void fail_at(const char* kind, const std::string& what, const std::string& place,
                            const std::string& more);
  std::string replay_hint() const;
  void lane_exited(int warp, uint32_t lane);  // warp.cpp
  [[noreturn]] void abandon(const std::string& report);
  std::string header(const char* kind, const std::string& what) const;
  void check_limits(const char* name, const LaunchRequest& request);
  void thread_exited();

  Fiber scheduler_;
  std::mt19937 random_{0};
  uint32_t ready_[32] = {}, ready_warps_ = 0;
  enum { kRandom, kAscending, kDescending, kOneWarpAhead } order_ = kRandom;
  int warp_rank_[32] = {};
  uint32_t preempt_one_in_ = 0, preempt_at_sync_one_in_ = 0;
  std::string failure_;
  bool failed_ = false;
  uint64_t switches_ = 0, accesses_ = 0;  // in this block
  uint64_t repeats_ = 0;                  // reads of what the thread read last since a thread waited or returned
  std::unordered_map<Site, uint32_t> site_numbers_;
  std::vector<Site> sites_;
  std::map<Site, std::string> places_;
  std::map<const void*, size_t> static_bytes_;  // of static shared memory, as far as a kernel's launches have shown
  Readers readers_;
  // Synchronizing calls by name, file, line and kernel (its counters): whether they are left out.
  std::map<std::tuple<const char*, const char*, unsigned, const Counters*>, bool> calls_;
  Site last_site_ = 0;
  uint32_t last_site_number_ = 0;
};

// Null outside a kernel. Of this thread of the process: others may run host code of launchers meanwhile, with its
// hooks.
extern thread_local Thread* running __attribute__((tls_model("initial-exec")));

// "threads 0-31, 64" of ascending numbers.
std::string ranges(const std::vector<int>& numbers);
// "(x, y, z)"
std::string text(const dim3& at);

}  // namespace fastgen::emulator
