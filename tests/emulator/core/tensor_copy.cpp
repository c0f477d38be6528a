// Copies of boxes from global to shared memory (PTX ISA, "cp.async.bulk.tensor" (.mbarrier)). Rows of a box
// arrive in any order, at once or late, and each completes its bytes of the mbarrier's phase.
#include <algorithm>
#include <cstring>

#include "core/engine.h"
#include "core/tensor_box.h"

namespace fastgen::emulator {

void tensor_load(void* target, const TensorMap& map, const int* at, const void* mbarrier, Where) {
  const auto site = reinterpret_cast<Site>(__builtin_return_address(0));
  Engine::get().tensor_load(static_cast<char*>(target), map, at, mbarrier, site);
}

void Engine::tensor_load(char* target, const TensorMap& map, const int* at, const void* barrier, Site site) {
  ++counters->async_copies;
  maybe_preempt_at_sync();
  const char* const what = "tensor_load";
  const Thread& thread = self();
  const std::vector<uint32_t> known = known_to(thread);

  Mbarrier& completes = mbarrier(barrier, what, site);
  const size_t announced = 2 * clock_section() + completes.initialized.thread();
  if (announced >= known.size() || known[announced] < completes.initialized.epoch()) {
    fail(kind::kProxy, "tensor_load: no fence_mbarrier_init after the initialization of its mbarrier", site,
         "by " + accessed_by(completes.initialized));
  }
  if (completes.copier < 0) {
    if (copiers == kMostCopiers)
      fail(kind::kMisuse, "tensor_load: over 64 mbarriers of tensor loads and threads with tensor stores", site);
    completes.copier = thread_count + warp_count + copiers++;
  }

  if (reinterpret_cast<uintptr_t>(target) % kBoxAlignment != 0) {
    fail(kind::kMisaligned, "tensor_load: the swizzle pattern begins at multiples of 1024 bytes", site);
  }
  const size_t bytes = rows_of(map) * kBoxRowBytes;
  const size_t offset = shared_offset(target, bytes, what, site);
  const size_t copy = tensor_copies.size();
  const size_t barrier_offset = shared.offset(reinterpret_cast<uintptr_t>(barrier));
  tensor_copies.push_back({thread.index, barrier_offset, site});
  const Before ordered = before_asynchronous(known);
  std::vector<TensorPiece> pieces;
  for_rows(map, at, [&](uint64_t row, int first, int valid, uintptr_t source) {
    pieces.push_back({copy, offset + row * kBoxRowBytes, source, first, valid});
    if (options.checks && valid > 0) {
      access_global(source, valid, Touch::kRead, stamp(site), before_asynchronous_global(known), site);
    }
  });
  if (options.checks) {
    const Stamp now = Stamp::make(completes.copier, completes.phase + 1, block_number, site_number(site));
    access_shared(offset, bytes, Touch::kWrite, now, ordered, site);
    std::fill_n(shared.cells(offset), bytes, Cell{Stamp::reference(kTensorCopyMark | copy), {}});
  }
  tensor_pieces.insert(tensor_pieces.end(), pieces.begin(), pieces.end());
  for (size_t i = 0; landing == kEarly && i < pieces.size(); ++i) land_tensor_piece(tensor_pieces.size() - 1);
}

void Engine::land_tensor_piece(size_t index) {
  const TensorPiece piece = tensor_pieces[index];
  tensor_pieces[index] = tensor_pieces.back();
  tensor_pieces.pop_back();
  char row[kBoxRowBytes] = {};
  if (piece.valid > 0) memcpy(row + piece.first, reinterpret_cast<const void*>(piece.source), piece.valid);
  for (int chunk = 0; chunk < kBoxRowBytes; chunk += kChunkBytes) {
    memcpy(shared.at(swizzled(piece.target + chunk)), row + chunk, kChunkBytes);
  }
  const TensorCopy& copy = tensor_copies[piece.copy];
  const auto entry = mbarriers.find(copy.mbarrier);
  if (entry == mbarriers.end()) {
    fail(kind::kMisuse, "tensor_load: the mbarrier was invalidated before the copy was complete", copy.site);
  }
  Mbarrier& barrier = entry->second;
  const auto phase = static_cast<uint32_t>(barrier.phase + 1);
  if (options.checks) {
    const Stamp written = Stamp::make(barrier.copier, phase, block_number, site_number(copy.site));
    std::fill_n(shared.cells(piece.target), kBoxRowBytes, Cell{written, {}});
  }
  barrier.current.add(nullptr, thread_count, barrier.copier, phase);
  barrier.bytes -= kBoxRowBytes;
  complete_if_done(barrier);
}

void Engine::land_some_tensor_pieces() {
  if (tensor_pieces.empty() || !chance(4)) return;
  for (uint32_t count = random_() % 64; count > 0 && !tensor_pieces.empty(); --count) {
    land_tensor_piece(random_() % tensor_pieces.size());
  }
}

void Engine::check_tensor_not_in_flight(uintptr_t address, size_t bytes, Site site) {
  for (const TensorPiece& piece : tensor_pieces) {
    if (address < piece.source + piece.valid && piece.source < address + bytes) {
      const TensorCopy& copy = tensor_copies[piece.copy];
      fail(kind::kAsyncCopy, "overwrites global memory that a tensor copy is still reading", site,
           "started by " + name_of(copy.owner) + " at " + source_of(copy.site) + ", with no wait since");
    }
  }
}

}  // namespace fastgen::emulator
