// The asynchronous proxy of sm_90: tensor copies and products of warpgroups.
//
// In clocks, numbers after those of the block's threads stand for the products of a warp, for the tensor loads of an
// mbarrier, and for the reads and the writes of a thread's tensor stores: what the proxy did comes before what a thread
// does now if the thread knows the epoch, of the group of products or of stores, or of the mbarrier's phase. Two
// further sections of a clock have, for each thread, the epoch up to which its writes, and its initializations of
// mbarriers, come before a fence between the proxies (Engine::clock_section).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <deque>
#include <vector>

#include "core/emulator.h"
#include "core/stamp.h"

namespace fastgen::emulator {

constexpr int kMostCopiers = 64;                         // mbarriers of tensor loads, and twice the storing threads
constexpr uint64_t kTensorCopyMark = uint64_t{1} << 59;  // in the cells that a tensor copy is writing, with its index

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};

struct TensorCopy {
  int owner = 0;
  size_t mbarrier = 0;  // offset in shared memory
  Site site = 0;
};

// A row of a box: 128 bytes, of which ``valid`` are copied, from the ``first`` one on; the others are zeros.
struct TensorPiece {
  size_t copy = 0, target = 0;
  uintptr_t source = 0;
  int first = 0, valid = 0;
};

// A thread's tensor stores.
struct TensorStores {
  int reader = -1;      // the number that stands for their reads in clocks; the next one stands for their writes
  uint32_t groups = 0;  // committed
  uint32_t newest = 0;  // of the groups that have stores
  uint32_t read = 0;    // groups that a wait, of either kind, has covered
  bool open = false;    // stores after the last commit
  Site last = 0;        // of the last store
};

// A row of a box on its way to global memory: ``valid`` bytes from the ``first`` one on.
struct StoredRow {
  int owner = 0;
  uint32_t group = 0;
  size_t source = 0;
  uintptr_t target = 0;
  int first = 0, valid = 0;
  bool is_read = false;
  char bytes[128] = {};
};

// Local variables that are registers of an unfinished product.
struct RegistersInFlight {
  uintptr_t begin = 0, end = 0;
  uint32_t group = 0;
  int columns = 0;  // of the accumulators; 0: a left operand
  Site site = 0;
};

// A product of one warp of a warpgroup, between its start and its execution.
struct Product {
  ProductRequest request = {};  // of lane 0
  int warp = 0;
  uint32_t group = 0;
  Site site = 0;
  float* d[32] = {};
  const uint32_t* a_registers[32] = {};
  uint32_t a[32][4] = {};
};

struct WarpProducts {
  std::deque<Product> pending;
  uint32_t groups = 0;    // committed
  uint32_t started = 0;   // products, in all
  uint32_t finished = 0;  // groups that a wait has covered
  Site last = 0;          // of the last product or commit
  bool open = false;      // products after the last commit
};

// The products of a warpgroup in the order in which its warps started them: they must agree.
struct WarpgroupLog {
  struct Entry {
    ProductRequest request;
    Where where;
    int warps = 0;  // that have started it
  };
  std::deque<Entry> entries;  // not started by all four
  uint32_t first = 0;         // number of the oldest
};

struct RegisterShare {
  int registers = 0;  // of each thread of the warp
  int wanted = 0;     // by a warp that waits for more; 0: none
};
// At the launch of a block that has as many registers as it may have.
int launch_registers(int warps);

}  // namespace fastgen::emulator
