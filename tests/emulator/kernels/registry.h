// Registry of kernels by name, for Python. All have the same signature, on the host and on CUDA.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "device/launch.cuh"
#include "device/tensor_copy.cuh"

namespace fastgen::kernels {

struct Arguments {
  const void* in[3] = {};
  void* out = nullptr;
  int n[6] = {};
};

using Kernel = void (*)(Arguments);

// The same with a tensor map of each input of 16-bit elements: its last dims are columns and rows, a box has 64 columns
// and n[1 + input] rows. Also of the output, with n[4] rows in a box; it lacks the last n[5] columns. sm_90.
struct MappedArguments : Arguments {
  device::TensorMap maps[3] = {}, out_map = {};
};
using MappedKernel = void (*)(MappedArguments);

// A planted bug in a sample kernel, and the expected finding: the first line of a report, or "wrong result" if only the
// output shows it.
struct Planted {
  std::string sample, mistake, finding;
  Kernel kernel;
  MappedKernel mapped = nullptr;  // if not null, in the place of ``kernel``
};

inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

inline std::map<std::string, MappedKernel>& mapped_kernels() {
  static std::map<std::string, MappedKernel> all;
  return all;
}

inline std::vector<Planted>& planted() {
  static std::vector<Planted> all;
  return all;
}

__device__ __forceinline__ const uint32_t* words(const Arguments& a, int which = 0) {
  return static_cast<const uint32_t*>(a.in[which]);
}
__device__ __forceinline__ uint32_t* results(const Arguments& a) { return static_cast<uint32_t*>(a.out); }

struct Register {
  Register(const char* name, Kernel kernel) { kernels().emplace(name, kernel); }
  Register(const char* name, MappedKernel kernel) { mapped_kernels().emplace(name, kernel); }
  Register(const char* sample, const char* mistake, const char* finding, Kernel kernel) {
    planted().push_back({sample, mistake, finding, kernel});
  }
  Register(const char* sample, const char* mistake, const char* finding, MappedKernel kernel) {
    planted().push_back({sample, mistake, finding, nullptr, kernel});
  }
};

}  // namespace fastgen::kernels
