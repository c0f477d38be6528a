// Copies by the tensor memory accelerator (PTX ISA, "cp.async.bulk.tensor", "Tensor swizzling modes"). Rows of a box
// arrive in any order, at once or late, and each completes its bytes of the mbarrier's phase.
#include <algorithm>
#include <cstring>

#include "core/engine.h"

namespace fastgen::emulator {

namespace {

constexpr int kRowBytes = 128, kChunkBytes = 16, kElementBytes = 2;
constexpr size_t kBoxAlignment = 1024;  // of the swizzle pattern

// Where the chunk at this offset of an aligned tile lies.
size_t swizzled(size_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

}  // namespace

void tensor_load(void* target, const TensorMap& map, const int* at, const void* mbarrier, Where) {
  const auto site = reinterpret_cast<Site>(__builtin_return_address(0));
  Engine::get().tensor_load(static_cast<char*>(target), map, at, mbarrier, site);
}

void Engine::tensor_load(char* target, const TensorMap& map, const int* at, const void* barrier, Site site) {
  ++counters->async_copies;
  maybe_preempt_at_sync();
  const char* const what = "tensor_load";
  const Thread& thread = self();
  auto known = thread.knowledge == nullptr ? std::vector<uint32_t>() : *thread.knowledge;
  if (known.size() < clock_section()) known.resize(clock_section(), 0);
  known[thread.index] = thread.epoch;

  Mbarrier& completes = mbarrier(barrier, what, site);
  const size_t announced = 2 * clock_section() + completes.initialized.thread();
  if (announced >= known.size() || known[announced] < completes.initialized.epoch()) {
    fail(kind::kProxy, "tensor_load: no fence_mbarrier_init after the initialization of its mbarrier", site,
         "by " + accessed_by(completes.initialized));
  }
  if (completes.copier < 0) {
    if (copiers == kMostCopiers) fail(kind::kMisuse, "tensor_load: over 64 mbarriers of tensor copies", site);
    completes.copier = thread_count + warp_count + copiers++;
  }

  const uint64_t rows = uint64_t{map.box[1]} * map.box[2] * map.box[3];
  if (reinterpret_cast<uintptr_t>(target) % kBoxAlignment != 0) {
    fail(kind::kMisaligned, "tensor_load: the swizzle pattern begins at multiples of 1024 bytes", site);
  }
  const size_t offset = shared_offset(target, rows * kRowBytes, what, site);
  const size_t copy = tensor_copies.size();
  const size_t barrier_offset = shared.offset(reinterpret_cast<uintptr_t>(barrier));
  tensor_copies.push_back({thread.index, barrier_offset, site});
  const Before ordered = before_asynchronous(known);
  const auto size = static_cast<int64_t>(map.sizes[0]);
  const int64_t first = std::clamp<int64_t>(-int64_t{at[0]}, 0, map.box[0]);
  const int64_t end = std::clamp<int64_t>(size - at[0], first, map.box[0]);
  std::vector<TensorPiece> pieces;
  for (uint64_t row = 0; row < rows; ++row) {
    const int64_t position[] = {at[1] + static_cast<int64_t>(row % map.box[1]),
                                at[2] + static_cast<int64_t>(row / map.box[1] % map.box[2]),
                                at[3] + static_cast<int64_t>(row / map.box[1] / map.box[2])};
    bool inside = end > first;
    int64_t distance = (at[0] + first) * kElementBytes;
    for (int dim = 0; dim < 3; ++dim) {
      inside = inside && position[dim] >= 0 && position[dim] < static_cast<int64_t>(map.sizes[dim + 1]);
      distance += position[dim] * static_cast<int64_t>(map.strides[dim]);
    }
    TensorPiece piece = {copy, offset + row * kRowBytes};
    if (inside) {
      piece.source = map.data + distance;
      piece.first = static_cast<int>(first) * kElementBytes,
      piece.valid = static_cast<int>(end - first) * kElementBytes;
      if (options.checks) access(reinterpret_cast<const void*>(piece.source), piece.valid, Touch::kRead, site, 1);
    }
    pieces.push_back(piece);
  }
  if (options.checks) {
    const Stamp now = Stamp::make(completes.copier, completes.phase + 1, block_number, site_number(site));
    access_shared(offset, rows * kRowBytes, Touch::kWrite, now, ordered, site);
    std::fill_n(shared.cells(offset), rows * kRowBytes, Cell{Stamp::reference(kTensorCopyMark | copy), {}});
  }
  tensor_pieces.insert(tensor_pieces.end(), pieces.begin(), pieces.end());
  for (size_t i = 0; landing == kEarly && i < pieces.size(); ++i) land_tensor_piece(tensor_pieces.size() - 1);
}

void Engine::land_tensor_piece(size_t index) {
  const TensorPiece piece = tensor_pieces[index];
  tensor_pieces[index] = tensor_pieces.back();
  tensor_pieces.pop_back();
  char row[kRowBytes] = {};
  if (piece.valid > 0) memcpy(row + piece.first, reinterpret_cast<const void*>(piece.source), piece.valid);
  for (int chunk = 0; chunk < kRowBytes; chunk += kChunkBytes) {
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
    std::fill_n(shared.cells(piece.target), kRowBytes, Cell{written, {}});
  }
  barrier.current.add(nullptr, thread_count, barrier.copier, phase);
  barrier.bytes -= kRowBytes;
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
