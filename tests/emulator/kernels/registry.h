// Kernels by name, for Python. They all take the same arguments, on the host and on CUDA.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "device/launch.cuh"

namespace fastgen::kernels {

struct Arguments {
  const void* in[3] = {};
  void* out = nullptr;
  int n[4] = {};
};

using Kernel = void (*)(Arguments);

// A mistake in a copy of a sample kernel, and the finding that must tell of it: the first line of a report, or
// "wrong result" where only the numbers show it.
struct Planted {
  std::string sample, mistake, finding;
  Kernel kernel;
};

inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

inline std::vector<Planted>& planted() {
  static std::vector<Planted> all;
  return all;
}

struct Register {
  Register(const char* name, Kernel kernel) { kernels().emplace(name, kernel); }
  Register(const char* sample, const char* mistake, const char* finding, Kernel kernel) {
    planted().push_back({sample, mistake, finding, kernel});
  }
};

}  // namespace fastgen::kernels
