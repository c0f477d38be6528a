// Controls of the emulator for tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace fastgen::emulator {

// How matrix instructions add products to the accumulator. The PTX ISA leaves it open; measured by Fasi, Higham,
// Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021: products are added in blocks, and in each block
// all terms, the accumulator too, are aligned to the largest exponent and truncated, with a few bits more than float32.
struct MatrixRounding {
  int width = 0;       // products in a block; 0: one exact sum of all products, rounded to nearest
  int extra_bits = 0;  // kept in the alignment
  uint64_t order = 0;  // seeds the order of the products; 0: ascending
};
// "nearest"; "volta", "ampere", "hopper": as measured; "any": one of these and an order, chosen by the seed. Throws
// std::invalid_argument.
MatrixRounding matrix_rounding(const std::string& name, uint64_t seed);

struct Options {
  uint64_t seed = 0;                // of the schedule; the seed of each launch is derived from it
  bool checks = true;               // of memory accesses; synchronization is always checked
  bool count_banks = true;          // of shared memory, per kernel
  MatrixRounding rounding;          // of matrix instructions
  std::string leave_out;            // a synchronizing call to skip, as in sites()
  size_t shared_limit = 99 * 1024;  // dynamic + static bytes a block may have: the least of all from sm_80 on
};

// Counted per kernel name, summed over launches.
struct Counters {
  // block_barriers: sync_block once a block, sync_named once a warp. matrix_loads: also stores.
  uint64_t launches = 0, blocks = 0, block_barriers = 0, warp_barriers = 0, shuffles = 0, matrix_products = 0,
           matrix_loads = 0, async_copies = 0, atomics = 0;
  // Warp-wide shared-memory accesses, the passes they need over the 32 banks, and those needed without conflicts.
  uint64_t shared_accesses = 0, shared_passes = 0, shared_passes_least = 0;
};
using Statistics = std::map<std::string, Counters>;

// Sets the options and resets the launch number, which determines the schedule.
void configure(const Options& options);
// Synchronizing calls since configure(): "sync_block csrc/common/reduce.cuh:32 in latent_forward".
std::vector<std::string> sites();
// Since the process began.
Statistics statistics();

// Around the host code of an operator. Outputs and workspaces allocated inside are fresh memory.
void enter_operator();
void leave_operator();
bool in_operator();

// Memory that kernels may access. ``fresh``: uninitialized.
void add_memory(const void* begin, size_t bytes, bool fresh, bool read_only = false);
void remove_memory(const void* begin);

}  // namespace fastgen::emulator
