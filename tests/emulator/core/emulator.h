// The functions behind the host twins of csrc/device/, called by kernels and launchers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;

// Coordinates of the running thread.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fastgen::emulator {

using Where = std::source_location;

struct LaunchRequest {
  dim3 grid, block;
  size_t shared_bytes = 0;
  void (*run)(void* call) = nullptr;  // calls the kernel
  void* call = nullptr;               // its arguments
  size_t call_bytes = 0;
  const void* kernel = nullptr;  // its code
};

// The threads in a kernel's __launch_bounds__, encoded as device/language.h does; 0 if there are none.
template <int kThreads, int kBlocks = 1>
struct LaunchBounds {
  char threads[kThreads];
};
int launch_bound(const void* kernel);

// Runs a grid. Throws Finding, or std::runtime_error if CUDA would reject the launch.
void run_grid(const char* name, const LaunchRequest& request);

// Shared memory that a block may have, in bytes.
size_t shared_limit();

// Threads of a warp.
enum class Shuffle { kXor, kUp, kDown, kIndex };
uint32_t shuffle(Shuffle mode, uint32_t mask, uint32_t value, int operand, Where where);
// The lanes whose predicate is true. All lanes must call with the same kind of vote.
enum class Vote { kBallot, kAny, kAll };
uint32_t vote(Vote kind, uint32_t mask, bool predicate, Where where);
void sync_warp(uint32_t mask, Where where);

// Threads of a block.
void sync_block(Where where);
void sync_named(int id, int threads, Where where);
void arrive_named(int id, int threads, Where where);

// Shared memory.
void* dynamic_shared();
void* shared_variable(const void* key, const char* name, size_t bytes, size_t alignment, Where where);

// Accesses of a given width, to global or shared memory: must be aligned to it.
void load(void* registers, const void* address, size_t bytes);
void store(void* address, const void* registers, size_t bytes);

// Atomic read-modify-write: update(address, operand) changes the memory, the old value is returned in ``old``.
void atomic(void* address, size_t bytes, const void* operand, void* old, void (*update)(void*, const void*));

// cp.async
void async_copy(void* target, const void* source, int bytes, int valid, Where where);
void async_copy_commit(Where where);
void async_copy_wait(int groups_left, Where where);  // -1: also those not committed
void async_copy_arrive(void* mbarrier, Where where);

// mbarrier
void mbarrier_init(void* mbarrier, int count, Where where);
void mbarrier_invalidate(void* mbarrier, Where where);
void mbarrier_arrive(void* mbarrier, int64_t expected_bytes, Where where);
void mbarrier_expect(void* mbarrier, int64_t bytes, Where where);
void mbarrier_complete(void* mbarrier, int64_t bytes, Where where);
bool mbarrier_test(const void* mbarrier, int parity, Where where);
void mbarrier_wait(const void* mbarrier, int parity, Where where);

// ldmatrix and stmatrix: 8x8 matrices of 16-bit elements, one row address a lane.
void load_matrices(uint32_t* registers, const void* row, int matrices, bool transposed, Where where);
void store_matrices(void* row, const uint32_t* registers, int matrices, bool transposed, Where where);

// d += a b. Fragments as in the PTX ISA; see matrix.cpp.
enum class Element { kFloat16, kBFloat16, kTFloat32 };
void multiply(Element element, float* d, const uint32_t* a, const uint32_t* b, Where where);

// sm_90: fences between proxies, tensor copies, products of warpgroups, registers.
void fence_async_proxy(Where where);
void fence_mbarrier_init(Where where);

// A tensor of 16-bit elements, dims from the innermost one; strides in bytes, of dims 1, 2 and 3.
struct TensorMap {
  uintptr_t data = 0;
  uint64_t sizes[4] = {}, strides[3] = {};
  uint32_t box[4] = {};
};
void tensor_load(void* target, const TensorMap& map, const int* at, const void* mbarrier, Where where);
void tensor_store(const TensorMap& map, const int* at, const void* source, Where where);
void tensor_store_commit(Where where);
void tensor_store_wait(int groups_left, bool written, Where where);  // not written: the sources are read

// The address field of a matrix descriptor.
uint64_t tile_address(const void* tile, Where where);
struct ProductRequest {
  Element element;
  int tiles;          // of 8 columns
  float* d;           // [tiles][4]
  const uint32_t* a;  // [4]; null: a_tile
  uint64_t a_tile, b_tile;
  bool transposed, add;
};
void wgmma(const ProductRequest& request, Where where);
void wgmma_fence(Where where);
void wgmma_commit(Where where);
void wgmma_wait(int groups_left, Where where);

void set_registers(int count, bool increase, Where where);

}  // namespace fastgen::emulator
