// Products of warpgroups (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"; "wgmma.mma_async",
// "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group").
//
// The warps of a warpgroup start the same products in the same order, but are not ordered with each other. A warp's
// part of a product is executed at any time between its start and a wait that covers it; meanwhile its registers must
// not be accessed and its tiles not written. Left operands in registers are read at the start.
#include <algorithm>
#include <cstring>

#include "common/types.h"
#include "core/engine.h"
#include "core/matrix.h"

namespace fastgen::emulator {

namespace {

constexpr int kWarpsOfGroup = 4;
constexpr int kChunkBytes = 16, kChunkElements = 8;
constexpr size_t kWord = sizeof(uint32_t);
constexpr uint32_t kWholeWarp = 0xffffffffu;

// --------------------------------------------------------------------------------------------------
// Tiles in shared memory. PTX ISA, "Matrix Descriptor Format", "Strides", "Shared Memory Matrix Layout".

struct Descriptor {
  size_t start, leading, stride;
  uint64_t base_offset, swizzle;

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        base_offset(bits >> 49 & 7),
        swizzle(bits >> 62) {}
};

constexpr uint64_t kSwizzle128 = 1;

// Offset in shared memory of the 16 bytes with element (outer, depth) and the seven after it: along the depth or,
// transposed, along the outer dim, the rows of a left and the columns of a right operand.
size_t chunk_offset(const Descriptor& tile, bool transposed, int outer, int depth) {
  const size_t linear = transposed
                            ? outer / 64 * tile.leading + outer % 64 * 2 + depth / 8 * tile.stride + depth % 8 * 128
                            : outer / 8 * tile.stride + outer % 8 * 128 + depth * 2;
  const size_t address = tile.start + linear;
  return address ^ (address >> 7 & 7) << 4;
}

// Calls body(outer, depth, offset) for each chunk of the ``count`` rows or columns from ``first`` on.
template <typename Body>
void for_chunks(uint64_t bits, bool transposed, int first, int count, Body&& body) {
  const Descriptor tile(bits);
  const int outer_step = transposed ? kChunkElements : 1, depth_step = transposed ? 1 : kChunkElements;
  for (int outer = first; outer < first + count; outer += outer_step) {
    for (int depth = 0; depth < kFragmentDepth; depth += depth_step) {
      body(outer, depth, chunk_offset(tile, transposed, outer, depth));
    }
  }
}

template <typename Set>
void read_tile(uint64_t bits, bool transposed, int first, int count, Element element, Set&& set) {
  for_chunks(bits, transposed, first, count, [&](int outer, int depth, size_t offset) {
    uint16_t chunk[kChunkElements];
    memcpy(chunk, Engine::get().shared.at(offset), sizeof(chunk));
    for (int i = 0; i < kChunkElements; ++i) {
      set(transposed ? outer + i : outer, transposed ? depth : depth + i, to_float(element, chunk[i]));
    }
  });
}

// --------------------------------------------------------------------------------------------------
// Execution

// The warp's 16 rows of d += a b.
void execute(const Product& product) {
  const ProductRequest& request = product.request;
  static float b[32 * kFragmentColumns][kFragmentDepth];
  float a[kFragmentRows][kFragmentDepth];
  const int first_row = product.warp % kWarpsOfGroup * kFragmentRows;
  if (request.a == nullptr) {
    read_tile(request.a_tile, false, first_row, kFragmentRows, request.element,
              [&](int row, int k, float value) { a[row - first_row][k] = value; });
  } else {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 8; ++i) {
        const int row = lane / 4 + i / 2 % 2 * 8, k = lane % 4 * 2 + i % 2 + i / 4 * 8;
        a[row][k] = to_float(request.element, static_cast<uint16_t>(product.a[lane][i / 2] >> 16 * (i % 2)));
      }
    }
  }
  read_tile(request.b_tile, request.transposed, 0, request.tiles * kFragmentColumns, request.element,
            [&](int column, int k, float value) { b[column][k] = value; });
  for (int tile = 0; tile < request.tiles; ++tile) {
    double d[kFragmentRows][kFragmentColumns];
    float right[kFragmentDepth][kFragmentColumns];
    for (int column = 0; column < kFragmentColumns; ++column) {
      for (int k = 0; k < kFragmentDepth; ++k) right[k][column] = b[tile * kFragmentColumns + column][k];
    }
    const auto for_elements = [&](auto&& body) {
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
          body(d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2], product.d[lane][tile * 4 + i]);
        }
      }
    };
    for_elements([&](double& sum, float& element) { sum = request.add ? element : 0.0f; });
    add_products(d, a, right);
    for_elements([&](double& sum, float& element) { element = static_cast<float>(sum); });
  }
}

// --------------------------------------------------------------------------------------------------
// Instructions

struct ProductLane {
  ProductRequest request;
  Thread* thread;
  Site site;
  Where where;
};

std::vector<Thread*> threads_of(const Meeting& meeting) {
  std::vector<Thread*> threads;
  for (void* lane : meeting.lanes) threads.push_back(static_cast<ProductLane*>(lane)->thread);
  return threads;
}

// What all lanes know, as the clock of an access that they make together.
std::vector<uint32_t> known_to_all(const std::vector<Thread*>& lanes, size_t most) {
  std::vector<uint32_t> known(most, UINT32_MAX);
  const void* last = nullptr;
  for (const Thread* lane : lanes) {
    const std::vector<uint32_t>* theirs = lane->knowledge.get();
    if (theirs == last && last != nullptr) continue;
    last = theirs;
    for (size_t i = 0; i < most; ++i) {
      known[i] = std::min(known[i], theirs != nullptr && i < theirs->size() ? (*theirs)[i] : 0);
    }
  }
  // A lane's own accesses come before what it starts; others must know of them.
  for (const Thread* lane : lanes) {
    uint32_t least = lane->epoch;
    for (const Thread* other : lanes) {
      const std::vector<uint32_t>* theirs = other->knowledge.get();
      const auto index = static_cast<size_t>(lane->index);
      if (other != lane) least = std::min(least, theirs != nullptr && index < theirs->size() ? (*theirs)[index] : 0);
    }
    known[lane->index] = least;
  }
  return known;
}

void run_start(Meeting& meeting) {
  Engine& engine = Engine::get();
  const auto& first = *static_cast<const ProductLane*>(meeting.lanes[0]);
  Product product;
  product.request = first.request, product.warp = first.thread->warp, product.site = first.site;
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const ProductLane*>(meeting.lanes[lane]);
    product.d[lane] = mine.request.d;
    product.a_registers[lane] = mine.request.a;
    if (mine.request.a != nullptr) memcpy(product.a[lane], mine.request.a, sizeof(product.a[lane]));
  }
  engine.start_product(product, threads_of(meeting), first.where);
}

void run_fence(Meeting& meeting) {
  constexpr size_t kWords = Fiber::kStackBytes / kWord;
  for (Thread* thread : threads_of(meeting)) {
    if (thread->written == nullptr) {
      thread->written.reset(static_cast<uint32_t*>(std::calloc(kWords, kWord)));
      if (thread->written == nullptr) throw std::bad_alloc();
    }
    thread->fenced = true, ++thread->fences;
  }
}

void run_commit(Meeting& meeting) {
  WarpProducts& mine = Engine::get().products[threads_of(meeting)[0]->warp];
  ++mine.groups, mine.open = false;
}

struct WaitLane : ProductLane {
  int groups_left;
};

void run_wait(Meeting& meeting) {
  Engine& engine = Engine::get();
  const auto left =
      static_cast<uint32_t>(static_cast<const WaitLane*>(static_cast<ProductLane*>(meeting.lanes[0]))->groups_left);
  const std::vector<Thread*> threads = threads_of(meeting);
  const int warp = threads[0]->warp;
  WarpProducts& mine = engine.products[warp];
  if (mine.groups <= left) return;
  mine.finished = std::max(mine.finished, mine.groups - left);
  engine.run_products(warp, mine.finished);
  for (Thread* thread : threads) {
    std::erase_if(thread->in_flight, [&](const RegistersInFlight& range) { return range.group <= mine.finished; });
    Gathering known;
    known.add(thread->knowledge, engine.thread_count, engine.thread_count + warp, mine.finished);
    thread->knowledge = known.share();
  }
}

constexpr WarpInstruction kStart = {"wgmma", true, true, run_start};
constexpr WarpInstruction kFence = {"wgmma_fence", true, true, run_fence};
constexpr WarpInstruction kCommit = {"wgmma_commit", true, true, run_commit};
constexpr WarpInstruction kWait = {"wgmma_wait", true, true, run_wait};

uint64_t mixed(const ProductRequest& request) {
  uint64_t bits = request.b_tile * 0x9E3779B97F4A7C15u ^ (request.a == nullptr ? request.a_tile : 1);
  bits = bits * 0xBF58476D1CE4E5B9u + static_cast<uint64_t>(request.tiles);
  return bits * 8 + request.transposed * 4 + request.add * 2 + (request.element == Element::kFloat16);
}

bool same_product(const ProductRequest& one, const ProductRequest& other) {
  return one.b_tile == other.b_tile && (one.a == nullptr) == (other.a == nullptr) && one.a_tile == other.a_tile &&
         one.tiles == other.tiles && one.transposed == other.transposed && one.add == other.add &&
         one.element == other.element;
}

}  // namespace

void Engine::start_product(Product& product, const std::vector<Thread*>& lanes, const Where& where) {
  const ProductRequest& request = product.request;
  const int warp = product.warp, warpgroup = warp / kWarpsOfGroup;
  if ((warpgroup + 1) * kWarpsOfGroup > warp_count) {
    fail(kind::kMisuse, "wgmma: the block ends within the warpgroup", product.site);
  }
  WarpProducts& mine = products[warp];
  WarpgroupLog& log = warpgroups[warpgroup];
  const size_t number = mine.started++ - log.first;
  if (number == log.entries.size()) log.entries.push_back({request, where, 0});
  WarpgroupLog::Entry& entry = log.entries[number];
  if (!same_product(entry.request, request) || entry.where.line() != where.line()) {
    fail(kind::kDivergence, "wgmma: another product than that of other warps of the warpgroup", product.site,
         "theirs at " + source_of(entry.where));
  }
  ++entry.warps;
  while (!log.entries.empty() && log.entries.front().warps == kWarpsOfGroup) log.entries.pop_front(), ++log.first;

  product.group = mine.groups + 1;
  mine.open = true, mine.last = product.site;
  for (int lane = 0; lane < 32; ++lane) {
    Thread& thread = *lanes[lane];
    const auto add_registers = [&](const void* registers, size_t bytes, int columns) {
      const auto begin = reinterpret_cast<uintptr_t>(registers), end = begin + bytes;
      const std::string which = columns > 0 ? "accumulators" : "a left operand";
      const auto offset = begin - thread.fiber.stack_begin();
      if (offset >= Fiber::kStackBytes)
        fail(kind::kMisuse, "wgmma: " + which + " must be a local variable", product.site);
      if (!thread.fenced) fail(kind::kProduct, "wgmma: no wgmma_fence before the first product", product.site);
      for (size_t word = offset / kWord; options.checks && word < (offset + bytes) / kWord; ++word) {
        if (thread.written[word] == thread.fences) {
          current_index = thread.index;
          fail(kind::kProduct, "wgmma: " + which + " written with no wgmma_fence since", product.site);
        }
      }
      for (RegistersInFlight& range : thread.in_flight) {
        if (range.begin == begin && range.end == end && range.columns == columns) {
          range.group = product.group;
          return;
        }
        if (begin < range.end && range.begin < end) {
          fail(kind::kProduct, "wgmma: " + which + " that a product of another shape is still using", product.site,
               "started at " + source_of(range.site));
        }
      }
      thread.in_flight.push_back({begin, end, product.group, columns, product.site});
    };
    add_registers(product.d[lane], request.tiles * 4 * sizeof(float), request.tiles * kFragmentColumns);
    if (request.a != nullptr) add_registers(product.a_registers[lane], sizeof(product.a[lane]), 0);
  }

  if (options.checks) {
    const std::vector<uint32_t> known = known_to_all(lanes, 2 * clock_section());
    const Before ordered = before_asynchronous(known);
    const Stamp now = Stamp::make(thread_count + warp, product.group, block_number, site_number(product.site));
    const auto read = [&](uint64_t bits, bool transposed, int first, int count) {
      const Descriptor tile(bits);
      if (tile.swizzle != kSwizzle128 || tile.base_offset != 0) {
        fail(kind::kMisuse, "wgmma: a tile without the 128-byte swizzle, or not at a multiple of 1024 bytes",
             product.site);
      }
      for_chunks(bits, transposed, first, count, [&](int, int, size_t offset) {
        if (shared.part(offset, kChunkBytes) == nullptr) {
          fail(kind::kOutOfBounds, "wgmma touches 16 bytes at " + shared.describe(offset), product.site);
        }
        access_shared(offset, kChunkBytes, Touch::kRead, now, ordered, product.site);
      });
    };
    if (request.a == nullptr) read(request.a_tile, false, warp % kWarpsOfGroup * kFragmentRows, kFragmentRows);
    read(request.b_tile, request.transposed, 0, request.tiles * kFragmentColumns);
  }
  mine.pending.push_back(product);
  if (landing == kEarly) run_products(warp, product.group);
}

void Engine::run_products(int warp, uint32_t last_group) {
  auto& pending = products[warp].pending;
  while (!pending.empty() && pending.front().group <= last_group) {
    execute(pending.front());
    pending.pop_front();
  }
}

void Engine::run_some_products() {
  const int warp = products.empty() ? -1 : static_cast<int>(random_() % products.size());
  if (warp < 0 || products[warp].pending.empty()) return;
  execute(products[warp].pending.front());
  products[warp].pending.pop_front();
}

void Engine::access_registers(const void* address, size_t bytes, Touch touch, Site site) {
  Thread& thread = *running;
  const auto begin = reinterpret_cast<uintptr_t>(address), end = begin + bytes;
  for (const RegistersInFlight& range : thread.in_flight) {
    if (begin < range.end && range.begin < end) {
      fail(kind::kProduct,
           std::string(touch == Touch::kRead ? "reads" : "writes") + " " +
               (range.columns > 0 ? "accumulators" : "a left operand") + " of a product with no wait since",
           site, "started at " + source_of(range.site));
    }
  }
  if (touch == Touch::kRead) return;
  const uintptr_t stack = thread.fiber.stack_begin();
  for (size_t word = (begin - stack) / kWord; word <= (end - 1 - stack) / kWord; ++word) {
    thread.written[word] = thread.fences;
  }
}

uint64_t tile_address(const void* tile, Where) {
  Engine& engine = Engine::get();
  const auto site = reinterpret_cast<Site>(__builtin_return_address(0));
  constexpr size_t kAlignment = 1024, kWindow = size_t{1} << 18;
  const size_t offset = engine.shared_offset(tile, kChunkBytes, "matrix_tile", site);
  if (offset % kAlignment != 0) {
    engine.fail(kind::kMisaligned, "matrix_tile: the swizzle pattern begins at multiples of 1024 bytes", site);
  }
  if (offset >= kWindow) engine.fail(kind::kMisuse, "matrix_tile: the address does not fit a descriptor", site);
  return offset >> 4;
}

void wgmma(const ProductRequest& request, Where where) {
  Engine& engine = Engine::get();
  const auto site = reinterpret_cast<Site>(__builtin_return_address(0));
  engine.maybe_preempt_at_sync();
  if (request.add) {
    for (int i = 0; i < 4 * request.tiles; ++i) {
      // Of accumulators that an unfinished product adds to, the products have the values.
      const bool busy = std::any_of(running->in_flight.begin(), running->in_flight.end(), [&](const auto& range) {
        return range.begin == reinterpret_cast<uintptr_t>(request.d);
      });
      if (busy) break;
      engine.check_register(float_to_bits(request.d[i]), "an accumulator", site);
    }
  }
  for (int i = 0; request.a != nullptr && i < 4; ++i) engine.check_register(request.a[i], "a left operand", site);
  if (running->lane == 0) ++engine.counters->matrix_products;
  ProductLane mine = {request, running, site, where};
  engine.meet(kStart, mixed(request), kWholeWarp, &mine, where, site);
}

void wgmma_fence(Where where) {
  Engine& engine = Engine::get();
  if (engine.left_out("wgmma_fence", where)) return;
  ProductLane mine = {{}, running, reinterpret_cast<Site>(__builtin_return_address(0)), where};
  engine.meet(kFence, 0, kWholeWarp, &mine, where, mine.site);
}

void wgmma_commit(Where where) {
  Engine& engine = Engine::get();
  if (engine.left_out("wgmma_commit", where)) return;
  ProductLane mine = {{}, running, reinterpret_cast<Site>(__builtin_return_address(0)), where};
  engine.meet(kCommit, 0, kWholeWarp, &mine, where, mine.site);
}

void wgmma_wait(int groups_left, Where where) {
  Engine& engine = Engine::get();
  if (engine.left_out("wgmma_wait", where)) return;
  engine.maybe_preempt_at_sync();
  WaitLane mine;
  mine.thread = running, mine.site = reinterpret_cast<Site>(__builtin_return_address(0)), mine.where = where;
  mine.groups_left = groups_left;
  ProductLane* const lane = &mine;
  engine.meet(kWait, static_cast<uint64_t>(groups_left), kWholeWarp, lane, where, mine.site);
}

}  // namespace fastgen::emulator
