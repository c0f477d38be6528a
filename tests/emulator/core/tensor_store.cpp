// Copies of boxes from shared to global memory (PTX ISA, "cp.async.bulk.tensor" (.bulk_group),
// "cp.async.bulk.commit_group", "cp.async.bulk.wait_group").
//
// Each row of a box is read at any time between the start of the copy and a wait, of either kind, that covers its
// group; it is written at any later time, at the latest at a wait for the writes or when the block ends. Groups belong
// to the thread that started the copies. In clocks each such thread has two numbers, for what its copies read and for
// what they write, whose epochs are its groups.
#include <cstring>

#include "core/engine.h"
#include "core/tensor_box.h"

namespace fastgen::emulator {

void Engine::tensor_store(const TensorMap& map, const int* at, const char* source, Site site) {
  ++counters->async_copies;
  maybe_preempt_at_sync();
  Thread& thread = self();
  TensorStores& stores = thread.stores;
  if (stores.reader < 0) {
    if (copiers + 2 > kMostCopiers) {
      fail(kind::kMisuse,
           "tensor_store: over 64 mbarriers of tensor loads and threads with tensor stores, counted twice", site);
    }
    stores.reader = thread_count + warp_count + copiers;
    copiers += 2;
  }
  if (reinterpret_cast<uintptr_t>(source) % kBoxAlignment != 0) {
    fail(kind::kMisaligned, "tensor_store: the swizzle pattern begins at multiples of 1024 bytes", site);
  }
  const size_t offset = shared_offset(source, rows_of(map) * kBoxRowBytes, "tensor_store", site);
  const uint32_t group = stores.groups + 1;
  stores.open = true, stores.last = site;
  const std::vector<uint32_t> known = known_to(thread);
  const Before ordered = before_asynchronous(known);
  const Stamp reads = Stamp::make(stores.reader, group, block_number, site_number(site));
  const Stamp writes = Stamp::make(stores.reader + 1, group, block_number, site_number(site));
  const size_t started = stored_rows.size();
  for_rows(map, at, [&](uint64_t row, int first, int valid, uintptr_t target) {
    if (valid == 0) return;
    const size_t tile = offset + row * kBoxRowBytes;
    if (options.checks) {
      for (int byte = first; byte < first + valid;) {
        const int count = std::min(first + valid, (byte / kChunkBytes + 1) * kChunkBytes) - byte;
        access_shared(swizzled(tile + byte), count, Touch::kRead, reads, ordered, site);
        byte += count;
      }
      access_global(target, valid, Touch::kWrite, writes, before_asynchronous_global(known), site);
    }
    stored_rows.push_back({thread.index, group, tile, target, first, valid, false, {}});
  });
  if (landing == kEarly) {
    for (size_t i = started; i < stored_rows.size(); ++i)
      read_stored_row(stored_rows[i]), write_stored_row(stored_rows[i]);
    stored_rows.resize(started);
  }
}

void Engine::read_stored_row(StoredRow& row) {
  if (row.is_read) return;
  for (int byte = 0; byte < kBoxRowBytes; byte += kChunkBytes) {
    memcpy(row.bytes + byte, shared.at(swizzled(row.source + byte)), kChunkBytes);
  }
  row.is_read = true;
}

void Engine::write_stored_row(const StoredRow& row) {
  memcpy(reinterpret_cast<void*>(row.target), row.bytes + row.first, row.valid);
}

// Of the copies of this thread, or of all if it is negative, up to the group.
void Engine::finish_stored_rows(int thread, uint32_t last_group, bool written) {
  std::erase_if(stored_rows, [&](StoredRow& row) {
    if (thread >= 0 && (row.owner != thread || row.group > last_group)) return false;
    read_stored_row(row);
    if (written) write_stored_row(row);
    return written;
  });
}

void Engine::land_some_stored_rows() {
  if (stored_rows.empty() || !chance(4)) return;
  for (uint32_t count = random_() % 64; count > 0 && !stored_rows.empty(); --count) {
    const size_t index = random_() % stored_rows.size();
    if (!stored_rows[index].is_read) {
      read_stored_row(stored_rows[index]);
      continue;
    }
    write_stored_row(stored_rows[index]);
    stored_rows[index] = stored_rows.back();
    stored_rows.pop_back();
  }
}

void Engine::check_tensor_stores_are_read() {
  for (int i = 0; i < thread_count; ++i) {
    const TensorStores& stores = threads[i]->stores;
    if (stores.open) {
      fail(kind::kAsyncCopy, name_of(i) + " returns with a tensor store that it has not committed to a group",
           stores.last);
    }
    if (stores.newest > stores.read) {
      fail(kind::kAsyncCopy, name_of(i) + " returns with a tensor store that may still read the block's shared memory",
           stores.last);
    }
  }
}

void tensor_store(const TensorMap& map, const int* at, const void* source, Where) {
  const auto site = reinterpret_cast<Site>(__builtin_return_address(0));
  Engine::get().tensor_store(map, at, static_cast<const char*>(source), site);
}

void tensor_store_commit(Where where) {
  if (Engine::get().left_out("tensor_store_commit", where)) return;
  TensorStores& stores = running->stores;
  ++stores.groups;
  if (stores.open) stores.newest = stores.groups;
  stores.open = false;
}

void tensor_store_wait(int groups_left, bool written, Where where) {
  Engine& engine = Engine::get();
  if (engine.left_out(written ? "tensor_store_wait" : "tensor_store_wait_read", where)) return;
  engine.maybe_preempt_at_sync();
  Thread& thread = *running;
  TensorStores& stores = thread.stores;
  const auto left = static_cast<uint32_t>(groups_left);
  if (stores.groups <= left || stores.reader < 0) return;
  const uint32_t covered = stores.groups - left;
  engine.finish_stored_rows(thread.index, covered, written);
  stores.read = std::max(stores.read, covered);
  Gathering known;
  known.add(thread.knowledge, engine.thread_count, stores.reader, covered);
  if (written) known.add(nullptr, engine.thread_count, stores.reader + 1, covered);
  thread.knowledge = known.share();
}

}  // namespace fastgen::emulator
